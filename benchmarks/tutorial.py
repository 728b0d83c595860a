"""Run every command of docs/tutorial.md for real, in order, and write what each prints below it.

    python benchmarks/tutorial.py CLONE [--from N] [--to N]

CLONE is a fresh clone of this repository; results stay in it. `--from` and `--to` are numbers of blocks of commands.
A block of commands that is followed by a block of output, or by the words that it is not written yet, gets the
standard output, a long one without its middle. Commands that serve are left out, since only their reader ends them.
The page is the one beside this script; it is written after each block, so a run that broke off goes on with `--from`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
COMMANDS = re.compile(r"^```sh\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"\n(?:```(?:text)?\n.*?^```$|\*Output: not written yet\.\*$)", re.MULTILINE | re.DOTALL)
HEAD, TAIL = 14, 5  # lines of a long output that stay
PROGRESS = re.compile(r"[\w ]+: \d+ of \d+$")  # of what takes long on a slow machine
MAKES = re.compile(r"installing into |\.venv/bin/|\S*python\S* -m venv ")  # what `make` tells of itself


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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--to", dest="last", type=int)
    asked = parser.parse_args()
    began = time.monotonic()
    blocks = [*enumerate(COMMANDS.findall(PAGE.read_text("utf-8")))]
    for number, commands in blocks[asked.first : asked.last]:
        if "align.serve" in commands:
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
