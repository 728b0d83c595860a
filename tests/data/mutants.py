"""Rows that went wrong somewhere, for fuzzing: a good row with up to three places replaced, deleted or repeated."""

from __future__ import annotations

import copy

from hypothesis import strategies as st

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(["", " ", "assistant", "system", "tool", "function_call", "[]", "{}", "{", "\ud800", b"x"]),
    st.integers(-1, 2),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.none() | st.text(max_size=2), max_size=3),
    st.dictionaries(st.sampled_from(["role", "from", "type", "name", "function", "value"]), st.text(max_size=2)),
)


def places(value, path=()):
    """Every path into a nested value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from places(child, (*path, key))


@st.composite
def mutated(draw, taken, formats):
    """(format, row) from good rows `taken`, {name: (format, row, …)}, now and then under another format's name."""
    format, row, *_ = taken[draw(st.sampled_from(sorted(taken)))]
    holder = {"row": copy.deepcopy(row)}
    for _ in range(draw(st.integers(0, 3))):
        *to, key = draw(st.sampled_from(list(places(holder))[1:] or [("row",)]))
        parent = holder
        for step in to:
            parent = parent[step]
        action = draw(st.sampled_from(["replace", "delete", "repeat"]))
        if action == "delete" and to:
            del parent[key]
        elif action == "repeat" and isinstance(parent, list):
            parent.insert(draw(st.integers(0, len(parent))), copy.deepcopy(parent[key]))
        else:
            parent[key] = draw(JUNK)
    return draw(st.sampled_from([format, format, format, *formats])), holder["row"]
