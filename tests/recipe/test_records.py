"""JSON lines come back as they were written, whatever characters and numbers they hold, and a torn one is told."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.recipe.errors import UserError
from align.recipe.records import each_line, parsed, read_lines, to_json

TEXT = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(["\x85", "a\u2028b\u2029", "\ud83d"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=5)


def finite(value):
    """What is to come back: null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list) else value


def refused(constant):
    raise AssertionError(f"{constant} is no JSON")


@given(OBJECTS, st.data())
def test_lines_come_back_and_a_torn_one_is_left_out(tmp_path_factory, objects, data):
    """Cut anywhere, inside a character too: what stands whole before the cut is read, and never more."""
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    raw = [(to_json(record) + "\n").encode() for record in objects]
    for line in raw:
        json.loads(line, parse_constant=refused)
    path.write_bytes(b"".join(raw))
    assert read_lines(path) == finite(objects)
    cut = data.draw(st.integers(0, len(b"".join(raw))))
    path.write_bytes(b"".join(raw)[:cut])
    whole = [i for i in range(len(raw)) if len(b"".join(raw[: i + 1])) - 1 <= cut]  # the newline may be lacking
    said = []
    assert read_lines(path, say=said.append) == finite(objects)[: len(whole)]
    torn = len(b"".join(raw[: len(whole)])) < cut
    assert [line.startswith(f"{path}:{len(whole) + 1}: the last line is torn") for line in said] == [True] * torn


LINES = st.binary(max_size=30) | st.sampled_from([b'{"step": 1}', b'{"step": "1"}', b"[" * 20_000])


@given(st.lists(LINES, max_size=5))
def test_any_bytes_are_read_or_refused_by_line(tmp_path_factory, chunks):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(b"\n".join(chunks))
    problems = ()
    try:
        assert all(isinstance(record["step"], int) for record in read_lines(path, {"step": int}))
    except UserError as error:
        problems = error.problems
    assert all(problem.startswith(f"{path}:") for problem in problems)
    assert len(problems) <= 4


def test_a_broken_line_and_one_of_another_shape_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "split": "eval"}\n{"step": 1, \n\n{"split": "train"}\n{"step": true, "split": ""}\n')
    with pytest.raises(UserError) as error:
        read_lines(path, {"step": int, "split": str}, remedy="start over with --fresh")
    assert error.value.problems == (
        f"{path}:2: not a JSON object; start over with --fresh",
        f"{path}:4: it has no 'step' of type int; start over with --fresh",
        f"{path}:5: it has no 'step' of type int; start over with --fresh",
    )
    assert [record and len(record) for _, record in each_line(path)] == [2, None, 1, 2]
    assert read_lines(tmp_path / "none.jsonl") == []
    assert math.isnan(parsed(b'{"a": NaN}')["a"])
