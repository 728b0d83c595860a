"""The examples of one side of a run, by number, and the order they come in; and the ledger of what became of
rows.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from align.data.store import Store
from align.data.trees import Tree
from align.recipe.schema import Source


class Part(NamedTuple):
    """The rows of one source that are left."""

    source: Source
    store: Store
    rows: np.ndarray  # (k,) int64, ascending indices into the store

    def less(self, drop: np.ndarray) -> Part:
        """Without the rows where `drop`, (k,) bool, is True."""
        return self._replace(rows=self.rows[~drop])


class Ledger:
    """What happened to rows: one entry for each that was dropped, truncated or repaired."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str | int]] = []
        self.dropped: Counter[str] = Counter()  # in a word, why

    def add(self, file: str, line: int, action: str, reason: str) -> None:
        """`action` is dropped, truncated or repaired."""
        self.entries.append({"file": file, "line": line, "action": action, "reason": reason})

    def drop(self, part: Part, drop: np.ndarray, kind: str, reason: str) -> Part:
        """`part` without the rows where `drop`, (k,) bool, is True, each of them with an entry."""
        for row in part.rows[drop]:
            self.add(*part.store.place(row), "dropped", reason)
        self.dropped[kind] += int(drop.sum())
        return part.less(drop)

    def count(self, action: str) -> int:
        """Entries with this action."""
        return sum(entry["action"] == action for entry in self.entries)

    def write(self, path: Path) -> None:
        """As JSONL, in the order of files and lines."""
        entries = sorted(self.entries, key=lambda entry: (entry["file"], entry["line"]))
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")


class Examples:
    """The examples of one side, numbered 0 … n - 1 over its sources, each cut to `max_length` tokens."""

    def __init__(self, parts: list[Part], max_length: int) -> None:
        self.parts, self.max_length = parts, max_length
        self.starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        self.lengths = joined([np.minimum(p.store.lengths[p.rows], max_length) for p in parts])  # (n,) int64
        self.labels = joined([labels_within(p, max_length) for p in parts])  # (n,) int64, trained tokens

    def __len__(self) -> int:
        return int(self.starts[-1])

    def tree(self, i: int) -> Tree:
        """Example `i`."""
        store, row = self._locate(i)
        tree = store.tree(row)
        if store.lengths[row] <= self.max_length:
            return tree
        assert len(tree.segments) == 1, "only examples without branches are cut"
        return Tree((tree.segments[0][: self.max_length],), (tree.trained[0][: self.max_length],))

    def where(self, i: int) -> str:
        """`file:line` of example `i`."""
        store, row = self._locate(i)
        return "{}:{}".format(*store.place(row))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Examples of one epoch, (m,) int64: a function of its arguments alone.

        A source of n rows and weight w gives round(w * n) of them. It deals its rows from one seeded shuffle
        after another and goes on where the last epoch stopped, so over the epochs all rows come equally
        often.
        """
        dealt = []
        for number, (part, start) in enumerate(zip(self.parts, self.starts, strict=False)):
            n = len(part.rows)
            if n == 0:
                continue
            count = max(1, round(part.source.weight * n))
            first, last = epoch * count, (epoch + 1) * count
            shuffles = range(first // n, -(-last // n))
            stream = np.concatenate([np.random.default_rng([seed, 1, number, k]).permutation(n) for k in shuffles])
            dealt.append(start + stream[first - shuffles.start * n : last - shuffles.start * n])
        return np.random.default_rng([seed, 2, epoch]).permutation(joined(dealt))

    def _locate(self, i: int) -> tuple[Store, int]:
        assert 0 <= i < len(self), f"example {i} of {len(self)}"
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        part = self.parts[which]
        return part.store, int(part.rows[i - self.starts[which]])


def labels_within(part: Part, limit: int) -> np.ndarray:
    """(k,) int64, trained tokens of each row within its first `limit` tokens."""
    store, labels = part.store, part.store.labels[part.rows].copy()
    starts = store.segments[store.examples[part.rows]]
    for i in np.flatnonzero(store.lengths[part.rows] > limit):
        labels[i] = store.trained[starts[i] : starts[i] + limit].sum()
    return labels


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
