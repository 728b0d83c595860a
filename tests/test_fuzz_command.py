"""Thousands of damaged recipes and rows through the command, up to the model: it ends well or says why, never else."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from often import often
from world import align, lines, write_rows

FUZZ = settings(
    max_examples=often(1000),
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure is shown as found: shrinking through the command is slow
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", " ", "user", "assistant", "tool", "text", "\ufdd0", "<|im_end|>", "[]", "{}", "\udc00"]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"role": "user"}, [{"type": "text"}]]),
)
FLAGS = st.sampled_from(
    ["--show", "--shw", "seed=3", "data.max_length=40", "data.overlong=drop", "data.train.1={}", "="]
)


def check(told):
    """Status 0 and a word on the data, or status 2 and lines that say something; no traceback."""
    assert told.status in (0, 2), told
    assert "Traceback" not in told.err + told.out
    if told.status:
        assert all(len(line) > 10 for line in told.err.splitlines() if line.strip()), told.err
        assert told.err.strip()
    else:
        assert re.search(r"train: \d+ rows?,", told.out)


def damaged(value, draw):
    """The value with one of its parts, at any depth, replaced, removed, doubled or renamed."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key = draw(st.sampled_from(sorted(items, key=str)))
        match draw(st.integers(0, 5)):
            case 0:
                del items[key]
            case 1 if isinstance(value, dict):
                items[draw(st.text(max_size=6))] = items.pop(key)
            case 1:
                items[len(items)] = items[key]
            case _:
                items[key] = damaged(items[key], draw)
        return items if isinstance(value, dict) else list(items.values())
    return draw(VALUES)


@pytest.fixture
def recipe(world, here):
    return world.recipe(here / "recipe.yaml")


@FUZZ
@given(data=st.data())
def test_damaged_recipe_text(recipe, data):
    """Lines and characters cut, doubled, swapped."""
    text = whole = recipe.read_text("utf-8")
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            rows = text.splitlines(keepends=True) or [""]
            i = data.draw(st.integers(0, len(rows) - 1))
            match data.draw(st.integers(0, 3)):
                case 0:
                    rows[i] = ""
                case 1:
                    rows.insert(data.draw(st.integers(0, len(rows))), rows[i])
                case 2:
                    at = data.draw(st.integers(0, len(rows[i])))
                    rows[i] = (
                        rows[i][:at] + data.draw(st.text("{}[]:-#&*!|>'\"%@`, \n\tx9\x00é", max_size=3)) + rows[i][at:]
                    )
                case _:
                    rows[i] = " " * data.draw(st.integers(0, 5)) + rows[i].lstrip()
            text = "".join(rows)
        recipe.write_text(text, encoding="utf-8")
        check(align(recipe, "--show", *data.draw(st.lists(FLAGS, max_size=2))))
    finally:
        recipe.write_text(whole, encoding="utf-8")


@FUZZ
@given(data=st.data())
def test_damaged_rows(recipe, world, here, data):
    """Keys and values of rows replaced, removed, renamed, by any JSON; lines of rubbish between them."""
    rows = [damaged(row, data.draw) if data.draw(st.booleans()) else row for row in lines(world.talks)[:3]]
    written = [json.dumps(row) for row in rows]
    if data.draw(st.booleans()):
        written.insert(data.draw(st.integers(0, 3)), data.draw(st.text(max_size=20)).replace("\udc00", ""))
    try:
        write_rows(here / "rows.jsonl", written)
    except UnicodeEncodeError:  # the test's own text
        return
    mode = data.draw(st.sampled_from(["error", "drop"]))
    check(align(recipe, "--show", "data.train.0.path=rows.jsonl", f"data.invalid={mode}", "data.eval.sources=[]"))
