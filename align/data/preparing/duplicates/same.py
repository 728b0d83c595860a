"""Rows that are the same by a key: all that stands in them, a column's value, or their prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from align.data.formats.rows import Row
from align.data.preparing.duplicates.groups import joined_by
from align.data.preparing.step import Decision, Item, Sketch, Sketches, Verdict, keep
from align.data.preparing.texts import normal
from align.data.templates.render import prompt_key

NOTHING = 0  # the key of a row that is compared with none
SIGNS = re.compile(r"[+<>=^$€£~|%]|[-*/.,](?=\s?\d)")  # `5 - 3` is not `5 + 3`
COMPARED = ("pairs", "ranked")  # kinds with a prompt and several answers


class Same:
    """Of the rows with one key, the first stays."""

    where = "workers"

    def __init__(self, name: str, key: Callable[[Item], Any], reason: str, drop: bool, *, raw: bool = False) -> None:
        """`key` gives None for a row that is compared with none; `reason`: why a row goes."""
        self.name, self.key, self.reason, self.drop, self.raw = name, key, reason, drop, raw

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """`key`: (n,) uint64."""
        return {"key": np.array([_hashed(self.key(item)) for item in items], np.uint64)}

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """See SetStep."""
        key = sketches["key"]
        rows = np.flatnonzero(alive & (key != NOTHING))
        leader, again = joined_by(key[rows], rows)
        return repeats(len(sketches), rows[again], leader[again], self.reason, self.drop)

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """Rows stay as they are."""
        return keep(item)


def repeats(n: int, rows: np.ndarray, leaders: np.ndarray, reason: str, drop: bool) -> Decision:
    """Of n rows, `rows` repeat earlier ones, `leaders`; both (m,) int64."""
    gone, because, group = np.zeros(n, np.int8), np.full(n, -1, np.int64), np.arange(n)
    gone[rows], because[rows], group[rows] = 1, leaders, leaders
    counts = {"repeated": len(rows), "groups": len(np.unique(leaders))}
    return Decision(gone if drop else None, (reason,), because, group, counts=counts)


def everything(row: Row) -> str:
    """All that stands in a row, as one text."""
    parts = [row.messages, row.text, row.tools, row.answers, row.targets, row.label]
    return json.dumps(parts, ensure_ascii=False, sort_keys=True)


def normalised(row: Row) -> str:
    """The same without case, punctuation, blanks and the form of Unicode, wherever there are words."""

    def bare(value: Any) -> Any:
        if isinstance(value, str):
            signs = SIGNS.findall(value)
            words = normal(value)
            return [words, signs] if words else "".join(value.split())
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items()}
        return list(map(bare, value)) if isinstance(value, list | tuple) else value

    parts = [row.messages, row.text, row.tools, row.answers]
    return json.dumps([bare(parts), row.targets, row.label], ensure_ascii=False, sort_keys=True)


def column(name: str) -> Callable[[Item], Any]:
    """The value of a column; None where it says nothing."""

    def key(item: Item) -> Any:
        value = item.record.get(name)
        value = value.strip() if isinstance(value, str) else value
        return None if value in (None, "") else json.dumps(value, sort_keys=True, default=str)

    return key


def prompt(item: Item) -> Any:
    """What the answers of a row answer; None where there is nothing to compare."""
    return prompt_key(item.row).hex() if item.kind in COMPARED else None


def _hashed(key: Any) -> int:
    if key is None:
        return NOTHING
    found = int.from_bytes(blake2b(str(key).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return found or 1
