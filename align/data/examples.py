"""The examples of one side of a run, by number, and the order they come in; and the ledger of what became of
rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from copy import copy
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
    """The examples of one side, numbered 0 … n - 1 over its sources, each path cut to `max_length` tokens."""

    targets: Sequence[tuple[float, ...]] | None = None  # in place of the store's

    def __init__(self, parts: list[Part], max_length: int) -> None:
        self.parts, self.max_length = parts, max_length
        self.starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        measured = [_measured(part, max_length) for part in parts] or [[np.zeros(0, np.int64)] * 4]
        # Each (n,) int64: distinct tokens, trained tokens, tokens of the longest path, root-to-leaf paths.
        self.lengths, self.labels, self.longest, self.paths = map(joined, zip(*measured, strict=True))

    @property
    def room(self) -> np.ndarray:
        """(n,) int64, tokens that each takes in a packed row at most: branches that begin with a label repeat the
        stem's last."""
        return self.lengths + self.paths - 1

    def __len__(self) -> int:
        return int(self.starts[-1])

    def with_targets(self, targets: Sequence[tuple[float, ...]]) -> Examples:
        """The same examples with these targets, one tuple an example, in place of their own."""
        assert len(targets) == len(self)
        other = copy(self)
        other.targets = targets
        return other

    def tree(self, i: int) -> Tree:
        """Example `i`."""
        store, row = self._locate(i)
        tree = cut(store.tree(row), self.max_length)
        return tree if self.targets is None else tree._replace(targets=self.targets[i])

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


def cut(tree: Tree, limit: int) -> Tree:
    """The tree with the end of every path beyond `limit` tokens cut off; a branch may be left empty."""
    stem = len(tree.segments[0])
    ends = [limit, *[max(limit - stem, 0)] * (len(tree.segments) - 1)]
    return Tree(*(tuple(part[:end] for part, end in zip(parts, ends, strict=True)) for parts in tree[:2]), tree.targets)


def unusable(tree: Tree, limit: int) -> str | None:
    """Why nothing can be learnt of the tree cut to `limit` tokens; None if something can."""
    (stem, *branches), trained, *_ = cut(tree, limit)
    if branches and not all(marks.any() for marks in trained[1:]):
        return f"its prompt of {len(tree.segments[0])} tokens leaves no room for an answer in {limit}"
    if not tree.targets and not any(marks.any() for marks in trained):
        return f"no trained token in its first {limit} tokens"
    if len(branches) > len({branch.tobytes() for branch in branches}):
        return f"its answers are the same in their first {limit - len(stem)} tokens"
    return None


def _measured(part: Part, limit: int) -> tuple[np.ndarray, ...]:
    store, rows = part.store, part.rows
    lengths, labels, longest = (array[rows].copy() for array in (store.lengths, store.labels, store.longest))
    paths = np.maximum(np.diff(store.examples)[rows] - 1, 1)
    for i in np.flatnonzero(longest > limit):
        tree = cut(store.tree(rows[i]), limit)
        lengths[i], labels[i] = sum(map(len, tree.segments)), tree.label_count
    return lengths, labels, np.minimum(longest, limit), paths


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
