"""Run every command of docs/tutorial.md for real, in order, and write what each prints below it.

    python benchmarks/tutorial.py CLONE [--from N] [--to N]

CLONE becomes a fresh clone of this repository if it is not there yet; results stay in it. `--from` and `--to` are
numbers of blocks of commands. A block of commands that is followed by a block of output, or by the words that it is not
written yet, gets the standard output, a long one without its middle. What a command serves is asked in a headless
Chromium, as a reader would: each model that it names, in the page; then it is ended as Ctrl-C ends it. The time from
the clone to the answer in the page is printed.
The page is the one beside this script; it is written after each block, so a run that broke off goes on with `--from`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
COMMANDS = re.compile(r"^```sh\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"\n(?:```(?:text)?\n.*?^```$|\*Output: not written yet\.\*$)", re.MULTILINE | re.DOTALL)
HEAD, TAIL = 14, 5  # lines of a long output that stay
PROGRESS = re.compile(r"[\w ]+: \d+ of \d+$")  # of what takes long on a slow machine
MAKES = re.compile(r"installing into |\.venv/bin/|\S*python\S* -m venv ")  # what `make` tells of itself
QUESTION = "How do I keep cut flowers fresh for longer?"
WAIT = 600  # seconds for what should come in the page, on a machine with much other work


def shown(output: str) -> str:
    """What the page shows of a standard output."""
    lines = [line.rstrip() for line in output.strip().splitlines() if not (PROGRESS.match(line) or MAKES.match(line))]
    if len(lines) > HEAD + TAIL + 1:
        lines = [*lines[:HEAD], "…", *lines[-TAIL:]]
    return "".join(f"{line}\n" for line in lines)


def run(number: int, commands: str, clone: Path) -> str:
    """The standard output of a block of commands; SystemExit with all that was said where one fails."""
    script = commands if commands.startswith("make ") else f"set -e\n. .venv/bin/activate\n{commands}"
    began = time.monotonic()
    told = subprocess.run(["bash", "-c", script], cwd=clone, capture_output=True, text=True)
    seconds = time.monotonic() - began
    print(f"{number}: {commands.splitlines()[-1][:80]}: status {told.returncode}, {seconds:.0f} s", flush=True)
    if told.returncode:
        raise SystemExit(told.stdout + told.stderr)
    return told.stdout


def has_browser() -> bool:
    """Whether a page can be opened here."""
    return bool(shutil.which("chromium") and shutil.which("chromedriver") and find_spec("selenium"))


@contextmanager
def served(command: Sequence[str], folder: Path | None = None) -> Iterator[str]:
    """The address at which a command serves; then it is ended as Ctrl-C ends it. SystemExit if that is no clean end."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            found = re.search(r"http://\S+", server.stdout.readline())
            if found:
                yield found[0]
        finally:
            server.send_signal(signal.SIGINT)
            status = server.wait(WAIT)
    if not found or status:
        raise SystemExit(f"{' '.join(command)}: status {status}")


def in_page(url: str, names: Sequence[str]) -> dict[str, str]:
    """What each model answers in a browser's window. SystemExit where the page tells a fault."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import Select, WebDriverWait

    options, answers = ChromeOptions(), {}
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    with Chrome(options, Service(shutil.which("chromedriver"))) as window:

        def found(css: str) -> list[Any]:
            return window.find_elements("css selector", css)

        def until(ready: Callable[[], Any]) -> None:
            WebDriverWait(window, WAIT, 0.05).until(lambda _: ready())

        window.get(url)
        until(lambda: found("#left option"))
        for name in names:
            found("#new")[0].click()
            Select(found("#left")[0]).select_by_visible_text(name)
            found("#words")[0].send_keys(QUESTION, "\n")
            until(lambda: found(".turn") and not found(".busy"))
            told = [found(f".turn {part}")[0].get_property("textContent").strip() for part in (".said", ".fault")]
            answers[name] = told[0]
            if told[1]:
                raise SystemExit(f"{name} in the page: {told[1]}")
    return answers


def ask(number: int, command: str, clone: Path, began: float | None) -> None:
    """Ask what a command serves; `began`: when the clone was made, if everything since then has been run."""
    started = time.monotonic()
    with served(["bash", "-c", f". .venv/bin/activate\nexec {command}"], clone) as url:
        answers = in_page(url, [Path(word).name for word in command.split() if word.startswith("runs/")])
        ended = time.monotonic()
    if not all(answers.values()):
        raise SystemExit(f"nothing is answered in the page: {answers}")
    for name, answer in answers.items():
        print(f"{number}: {name} in the page: {answer!r}")
    print(f"{number}: {command.strip()}: all answers in the page after {ended - started:.0f} s", flush=True)
    if began is not None:
        minutes, seconds = divmod(round(ended - began), 60)
        print(f"{number}: from the clone to the answer in the page: {minutes} min {seconds} s", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int)
    asked = parser.parse_args()
    blocks = [*enumerate(COMMANDS.findall(PAGE.read_text("utf-8")))][asked.first : asked.last]
    if any("align.serve" in commands for _, commands in blocks) and not has_browser():
        raise SystemExit("the page is asked in a browser: this needs chromium, chromedriver and the package selenium")
    began = time.monotonic()
    if not asked.clone.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, asked.clone], check=True)
    for number, commands in blocks:
        if "align.serve" in commands:
            ask(number, commands, asked.clone, None if asked.first else began)
            continue
        output, page = run(number, commands, asked.clone), PAGE.read_text("utf-8")
        end = page.index(f"```sh\n{commands}```\n") + len(f"```sh\n{commands}```\n")
        if there := OUTPUT.match(page, end):
            free = "align.chat" in commands or "--show" in commands  # words of a model, not of the program
            block = f"\n```{'' if free else 'text'}\n{shown(output)}```"
            PAGE.write_text(page[:end] + block + page[there.end() :], encoding="utf-8")
    print(f"all of it: {(time.monotonic() - began) / 60:.1f} minutes; the outputs stand in {PAGE}")


if __name__ == "__main__":
    main()
