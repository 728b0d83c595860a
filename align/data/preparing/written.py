"""Canonical rows as they are written: columns that the stages read back, one layout for each kind of row.

In Parquet, what differs in shape from row to row (tools, arguments of calls) is JSON text, and a key stands in the
schema only where some row has it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from align.data.preparing.step import Item, Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
KEYS = ("reasoning_content", "tool_calls", "name", "tool_call_id", "train")  # that some messages have
EXTRA = (*KEYS, "tools", "margin")  # in the order of their bits
TEXT, WHOLE, REAL, TRUTH, OTHER = 1, 2, 4, 8, 16  # what a column holds, as bits
TYPES = {str: TEXT, int: WHOLE, float: REAL, bool: TRUTH}


def shapes(items: Sequence[Item], kept: Sequence[str]) -> dict[str, np.ndarray]:
    """What the schema of the whole set has to know, each (n,): the place of the kind, the bits of EXTRA, and the bits
    of what each kept column holds."""
    columns = {
        "kind": np.array([KINDS.index(item.kind) for item in items], np.int8),
        "extra": np.array([_extra(item) for item in items], np.int32),
    }
    for name in kept:
        columns[f"kept:{name}"] = np.array([_holds(item.record.get(name)) for item in items], np.int8)
    return columns


def as_row(item: Item, kept: Sequence[str]) -> dict[str, Any]:
    """The columns of one row; kept ones give way to the row's own of the same name."""
    row, prompt = item.row, item.row.messages
    match item.kind:
        case "text":
            said = {"text": row.text}
        case "classes":
            said = {"text": row.text, "label": row.label}
        case "messages":
            said = {"messages": prompt}
        case "prompts":
            said = {"prompt": prompt}
        case "pairs":
            best, worst = row.answers
            said = {"prompt": prompt, "chosen": [best], "rejected": [worst]}
            said |= {"margin": row.targets[0]} if row.targets else {}
        case "ranked":
            said = {"prompt": prompt, "answers": [[answer] for answer in row.answers]}
        case "labelled":
            said = {"prompt": prompt, "completion": list(row.answers), "label": row.targets[0] > 0.5}
    said |= {"tools": row.tools} if row.tools else {}
    return {name: item.record[name] for name in kept if name in item.record} | said


def as_jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    """One row a line."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_parquet(rows: Sequence[dict[str, Any]], kind: Kind, extra: int, kept: Mapping[str, int]) -> bytes:
    """A Parquet file of rows of one kind; `extra` and `kept` are the bits of all rows of the set together."""
    import pyarrow
    from pyarrow import parquet

    there = {name for bit, name in enumerate(EXTRA) if extra >> bit & 1}
    text, real, truth = pyarrow.string(), pyarrow.float64(), pyarrow.bool_()
    message = [("role", text), ("content", text)]
    message += [(key, truth if key == "train" else text) for key in KEYS if key in there]
    turns = pyarrow.list_(pyarrow.struct(message))
    layout = {
        "text": {"text": text},
        "classes": {"text": text, "label": text},
        "messages": {"messages": turns},
        "prompts": {"prompt": turns},
        "pairs": {"prompt": turns, "chosen": turns, "rejected": turns, "margin": real},
        "ranked": {"prompt": turns, "answers": pyarrow.list_(turns)},
        "labelled": {"prompt": turns, "completion": turns, "label": truth},
    }[kind]
    layout = {name: type_ for name, type_ in layout.items() if name not in EXTRA or name in there}
    if "tools" in there:
        layout["tools"] = text
    alone = {TEXT: text, WHOLE: pyarrow.int64(), REAL: real, WHOLE | REAL: real, TRUTH: truth}
    others = {name: alone.get(bits, text) for name, bits in kept.items() if name not in layout}
    as_text = {name for name, bits in kept.items() if bits not in alone and name not in layout}
    schema = pyarrow.schema(list((others | layout).items()))
    table = pyarrow.Table.from_pylist([_flat(row, as_text) for row in rows], schema)
    file = io.BytesIO()
    parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def _flat(row: dict[str, Any], as_text: set[str]) -> dict[str, Any]:
    """A row with everything that has no one shape as JSON text."""
    flat = {}
    for name, value in row.items():
        if name == "tools" or (name in as_text and value is not None):
            flat[name] = json.dumps(value, ensure_ascii=False)
        else:
            flat[name] = _calls_as_text(value) if isinstance(value, list) else value
    return flat


def _calls_as_text(value: list[Any]) -> list[Any]:
    """Turns, or lists of turns, with their tool calls as JSON text."""
    found = []
    for turn in value:
        if isinstance(turn, list):
            turn = _calls_as_text(turn)
        elif isinstance(turn, dict) and "tool_calls" in turn:
            turn = turn | {"tool_calls": json.dumps(turn["tool_calls"], ensure_ascii=False)}
        found.append(turn)
    return found


def _extra(item: Item) -> int:
    row = item.row
    keys = {key for message in (*(row.messages or ()), *row.answers) for key in message}
    there = keys | ({"tools"} if row.tools else set()) | ({"margin"} if item.kind == "pairs" and row.targets else set())
    return sum(1 << bit for bit, name in enumerate(EXTRA) if name in there)


def _holds(value: Any) -> int:
    kind = TYPES.get(type(value), OTHER) if value is not None else 0
    return OTHER if kind == WHOLE and not -(2**63) <= value < 2**63 else kind
