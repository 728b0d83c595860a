"""The tutorial, command by command, as a reader types it: on a tiny base, with recipes cut to a few steps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_processes import free_port
from world import WAIT

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {  # in the recipes: what a tiny base does not need
    r"max_length: \d+": "max_length: 2048",
    r"eval: \{fraction: 0.[12]\}": "eval: {fraction: 0.1, max_rows: 2}",
    r"max_new: \d+": "max_new: 8",
    r"^train: .*": "train: {steps: 2, eval_every: 2}",
    r"batch: \{examples: \d+\}": "batch: {examples: 4}",
    r"^log:$": "log:\n  sample_tokens: 8",
}


@pytest.fixture
def clone(world, cache, tmp_path) -> Path:
    """What a reader has: recipes and data, a Makefile whose installation is done, and nothing else."""
    folder = tmp_path / "clone"
    (folder / ".venv").mkdir(parents=True)
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for name in ("data_templates", "recipes"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv" / "installed").touch()
    tiny = tmp_path / "base"
    shutil.copytree(world.base, tiny)
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    for recipe in (folder / "recipes").glob("*.yaml"):
        text = recipe.read_text("utf-8").replace("demo/smollm2-135m", str(tiny))
        for pattern, shorter in SHORTER.items():
            text = re.sub(pattern, shorter, text, flags=re.MULTILINE)
        recipe.write_text(text, encoding="utf-8")
    return folder


def blocks() -> list[tuple[str, str]]:
    """Of the page, in order: ("sh", commands) and ("text", what they print)."""
    return BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text("utf-8"))


def form(text: str) -> list[str]:
    """Lines without their numbers: what an output has in common with that of another model."""
    lines = [re.sub(r"\d[\d,.]*", "0", line).strip() for line in text.splitlines()]
    return [re.sub(r"\S*/base\b|demo/smollm0-0m", "BASE", line) for line in lines if line and line != "…"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_runs_and_prints_what_the_page_shows(clone, cache, tmp_path):
    base, said = tmp_path / "base", []
    env = os.environ | {
        "ALIGN_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    for kind, body in blocks():
        if kind == "text":  # all words of the shown lines, of which a model says none
            missing = [line for line in form(body) if line not in form("\n".join(said))]
            assert missing == [], "\n".join(said)
            continue
        body = body.replace("demo/smollm2-135m", str(base)).replace("max_new: 40", "max_new: 8")
        if "align.serve" in body:
            serve(body, clone, env)
            continue
        script = f"set -e\n. .venv/bin/activate\n{body}"
        told = subprocess.run(["bash", "-c", script], cwd=clone, env=env, capture_output=True, text=True, timeout=WAIT)
        assert told.returncode == 0, f"{body}\n{told.stdout}\n{told.stderr}"
        said = (told.stdout + told.stderr).splitlines()


def serve(command: str, clone: Path, env: dict[str, str]) -> None:
    """Start it, ask it once, end it as Ctrl-C does."""
    port = free_port()
    words = [".venv/bin/python", *command.split()[1:], "--port", str(port)]
    with subprocess.Popen(words, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            page = answered(server, f"http://127.0.0.1:{port}/")
            assert "<html" in page.lower()
            known = json.loads(answered(server, f"http://127.0.0.1:{port}/v1/models"))
            asked = {"model": known["data"][0]["id"], "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            assert json.load(urllib.request.urlopen(request, timeout=WAIT))["choices"]
        finally:
            server.send_signal(signal.SIGINT)
            told = server.communicate(timeout=WAIT)[0].decode()
    assert server.returncode == 0, told


def answered(server: subprocess.Popen, url: str) -> str:
    """What an address gives as soon as somebody listens there."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            with urllib.request.urlopen(url, timeout=WAIT) as reply:
                return reply.read().decode()
        except OSError:
            assert server.poll() is None, server.communicate()[0].decode()
            assert time.monotonic() < deadline, f"nobody listens at {url}"
            time.sleep(0.2)
