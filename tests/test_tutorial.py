"""The tutorial, command by command in its order: on a tiny base, with recipes cut to a few steps."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import sys
import urllib.request
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_processes import free_port
from world import align

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^cat > (?P<file>\S+) <<'END'\n(?P<rows>.*?)^END$|^(?P<line>\S[^\n]*)$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r'(?:echo "(?P<said>[^"]+)" \| )?python -m align\.(?P<module>\w+) (?P<words>.*)')
SHORTER = {  # in recipes: what a tiny base does not need
    r"max_length: \d+": "max_length: 2048",
    r"eval: \{fraction: 0.[12]\}": "eval: {fraction: 0.1, max_rows: 2}",
    r"max_new: \d+": "max_new: 8",
    r"batch: \{examples: \d+\}": "batch: {examples: 4}",
    r"^log:$": "log:\n  sample_tokens: 8",
}
WAIT = 240  # seconds for an answer on a machine with much other work
WHICH = re.compile(r"(dpo|grpo|Neither|Not|The interval|What it wins)\b")  # of a verdict: it depends on the model


def shorter(recipe: str, base: Path) -> str:
    """A recipe for the tiny base."""
    for pattern, short in SHORTER.items():
        recipe = re.sub(pattern, short, recipe, flags=re.MULTILINE)
    return recipe.replace("demo/smollm2-135m", str(base))


@pytest.fixture
def clone(world, here, monkeypatch) -> Path:
    """What a reader has: recipes and data. The working folder is there."""
    base, folder = here / "base", here / "clone"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    for name in ("data_templates", "recipes"):
        shutil.copytree(ROOT / name, folder / name)
    for recipe in (folder / "recipes").glob("*.yaml"):
        recipe.write_text(shorter(recipe.read_text("utf-8"), base), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as `python -m` does, for the reward of one's own
    return folder


def form(text: str) -> list[str]:
    """Lines without numbers, their intervals, names of bases and verdicts: what outputs of two models have in common. A
    tiny one has no plan, and numbers that are all the same no interval."""
    lines = [
        line
        for line in text.splitlines()
        if line not in ("", "…") and not line.startswith(("plan:", "peak:", "      "))
    ]
    lines = [re.sub(r"\S*/base\b|demo/smollm2-135m", "BASE", line).split("(")[0] for line in lines]
    lines = [re.sub(r"\b(bfloat16|float32)", "DTYPE", line) for line in lines]
    lines = ["WHICH IS BETTER" if WHICH.match(line) else line for line in lines]
    for written, read in (
        (r"[-+−]?\d[\d,.]*(e[-+−]?\d+)?", "0"),
        (" +", " "),
        (r" \S+_(low|high) 0", ""),
        ("0 min 0 s", "0 s"),
    ):
        lines = [re.sub(written, read, line).strip() for line in lines]
    return lines


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs_and_prints_what_the_page_shows(clone, monkeypatch):
    said = ""
    for kind, body in FENCE.findall((ROOT / "docs" / "tutorial.md").read_text("utf-8")):
        if kind == "text":
            assert [line for line in form(body) if line not in form(said)] == [], said
            continue
        said = ""
        for command in COMMAND.finditer(body):
            if command["file"]:
                Path(command["file"]).write_text(shorter(command["rows"], clone.parent / "base"), encoding="utf-8")
            elif "align.serve" in command["line"]:
                serve(command["line"])
            else:
                said += run(command["line"], monkeypatch)


def run(line: str, monkeypatch) -> str:
    """The standard output of a command, run in this process."""
    if line == ". .venv/bin/activate":
        return ""
    if line == "make chat":
        (line,) = re.findall(
            r"^chat:.*\n\t\.venv/bin/accelerate launch -q (.*)$", (ROOT / "Makefile").read_text(), re.M
        )
        line = f"python {line}"
    command = PYTHON.fullmatch(line)
    assert command, f"the test cannot run: {line}"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((command["said"] or "").encode())))
    words = shlex.split(command["words"].replace("demo/smollm2-135m", "../base"))
    if command["module"] in ("sft", "dpo", "grpo"):
        words += ["train.steps=2", "train.eval_every=2"]
    told = align(*words, stage=import_module(f"align.{command['module']}"))
    assert told.status == 0, f"{line}\n{told.out}\n{told.err}"
    return told.out


def serve(line: str) -> None:
    """Start it, ask every model over the protocol, and in the page each that the line names, as the benchmark does."""
    words = [sys.executable, *shlex.split(line)[1:], "--port", str(free_port())]
    benchmark = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "tutorial.py")))
    with benchmark.served(words) as url:
        for model in json.loads(fetched(f"{url}/v1/models"))["data"]:
            talk = {"model": model["id"], "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
            assert json.loads(fetched(f"{url}/v1/chat/completions", talk))["choices"]
        names = [Path(word).name for word in words if word.startswith("runs/")]
        assert names
        if benchmark.has_browser():
            assert [*benchmark.in_page(url, names)] == names
        else:
            assert "<html" in fetched(f"{url}/")


def fetched(url: str, body: dict | None = None) -> str:
    """What an address gives."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT) as reply:
        return reply.read().decode()
