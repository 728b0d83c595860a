"""A source is tokenised once, however many runs ask for it at the same time."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from forks import forked
from models.tiny import tiny_tokenizer
from often import REPEATS, repeated
from world import write_rows

from align.data.formats.reading import Reading
from align.data.store import stored
from align.data.templates.render import conversations
from align.data.templates.templates import chat_tokenizer
from align.recipe.schema import Source

CHANCE = random.Random()


def ask(folder: Path, distance: float) -> None:
    """Read the source, and note every row that is rendered for it."""
    own = conversations("assistant")

    def render(rows, tokenizer):
        with (folder / "rendered").open("a") as file:
            file.write("row\n" * len(rows))
        time.sleep(0.02)
        return own.render(rows, tokenizer)

    time.sleep(distance)
    source = Source(path=str(folder / "d.jsonl"))
    store = stored(source, chat_tokenizer(tiny_tokenizer(), "chatml"), Reading("x", own.formats, render), folder)
    os._exit(0 if len(store.line) == 5 else 1)


@pytest.mark.parametrize("times", [1, pytest.param(200 * REPEATS, marks=repeated)])
def test_runs_that_ask_at_once_wait_for_the_first(tmp_path, times):
    for number in range(times):
        folder, distance = tmp_path / str(number), (0, 0.005, 0.03, CHANCE.uniform(0, 0.1))[min(number, 3)]
        folder.mkdir()
        write_rows(folder / "d.jsonl", [{"prompt": f"Say {i}", "completion": "yes"} for i in range(5)])
        runs = 4 if number < 3 else 2
        asking = [forked(ask, folder, i * distance) for i in range(runs)]
        for process in asking:
            process.join()
        assert [process.exitcode for process in asking] == [0] * runs
        assert (folder / "rendered").read_text() == "row\n" * 5
        (store,) = (folder / "tokens").iterdir()  # no lock, and nothing half built
        assert not store.name.startswith(".")
