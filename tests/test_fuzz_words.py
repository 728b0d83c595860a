"""Any words on the command line of any command: it does something and says so, or it says what is wrong, in lines."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from often import REPEATS
from world import align, tree

COMMANDS = ["sft", "reward", "dpo", "ppo", "classify", "evaluate", "compare", "pipeline", "chat", "classify --predict"]
LONG = "x" * 300
PATHS = [
    "", " ", ".", "..", "-", "/", "~", "~nobody/a", "$HOME/none", "$NOWHERE", "${NOWHERE}/a", LONG, f"a/{LONG}",
    "a/" * 2100, "a\0b", "\udcff", "\ud800", "\x1b[2J", "dangling", "loop", "loop/x", "folder", "folder/", "binary",
    "empty.yaml", "list.yaml", "half.yaml", "other.yaml", "empty.yaml/x", "/dev/null", "/proc/self/mem", "一", "a\nb",
    "a\r\nb",
]  # fmt: skip
FLAGS = [
    "--fresh", "--show", "--shw", "--schema", "--help", "-h", "-", "--", "--predict", "--adapter", "--system", "--seed",
    "--dry-run", "--text", "--format", "=", "a=", "=b", "run=", "run=x=y", "data.train.0.path=x", "a.b.c=1", "x.0.1=[",
    "run=\udcff", "run=\x1b[2J", "model=*a", f"{LONG}=1", f"run={LONG}", "run=a\0b", "seed=" + "9" * 5000, "1", "-1",
    "nan", "--\x1b[2J", "-\x1b",
]  # fmt: skip
WORDS = st.lists(st.sampled_from(PATHS) | st.sampled_from(FLAGS) | st.text(max_size=6), max_size=4)
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.fixture
def place(here, monkeypatch) -> Path:
    """A folder with recipes that are none."""
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("HOME", str(here))
    os.symlink("nowhere", here / "dangling")
    os.symlink("loop", here / "loop")
    (here / "folder").mkdir()
    (here / "binary").write_bytes(bytes(range(256)) * 4)
    (here / "empty.yaml").write_text("")
    (here / "list.yaml").write_text("- 1\n")
    (here / "half.yaml").write_bytes(b'stage: sft\nrun: "\\ud800"\n')
    (here / "other.yaml").write_text("stage: dpo\nrun: x\n")
    return here


def check(place: Path, command: str, words: list[str]) -> None:
    """Status 0 with something told, or 2 with lines that are safe to print; and no file is touched."""
    name, *first = command.split()
    before = tree(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        told = align(*first, *words, stage=import_module(f"align.{name}"))
    assert told.status in (0, 2), (command, words, told)
    assert "Traceback" not in told.err
    assert told.out if told.status == 0 else told.err.strip(), (command, words)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in told.err), (command, words, told.err)
    assert tree(place) == before


@settings(max_examples=200, **FUZZ)
@given(command=st.sampled_from(COMMANDS), words=WORDS)
@example(command="sft", words=["-\x1b[2J", "a\nb"])
@example(command="pipeline", words=["\x1b[2J", "--dry"])
@example(command="chat", words=["\udcff", "--seed", "\x1b"])
def test_any_words(place, command, words):
    check(place, command, words)


@pytest.mark.slow
@pytest.mark.timeout(900 * REPEATS)
@settings(max_examples=2000 * REPEATS, **FUZZ)
@given(command=st.sampled_from(COMMANDS), words=WORDS)
def test_any_words_at_length(place, command, words):
    check(place, command, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_of_every_command(place, command):
    for path in PATHS:
        check(place, command, [path])
