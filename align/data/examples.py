"""The examples of one side of a run, by number, and the order they come in; and the ledger of what became of
rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from align.data.proportions import passes_of
from align.data.store import Left, Store
from align.data.trees import Tree
from align.recipe.schema import Source

FIRST = 3  # rows of each kind of drop that an error names


class Part(NamedTuple):
    """The rows of one source that are left."""

    source: Source
    store: Store
    rows: np.ndarray  # (k,) int64, ascending indices into the store
    chunks: np.ndarray | None = None  # (k, 2) int64, first and last token (excluded) of a chunk; 0 and 0 for whole rows
    left: Left | None = None  # the rows that steps of preparation left of the source, where there were any

    def less(self, drop: np.ndarray) -> Part:
        """Without the rows where `drop`, (k,) bool, is True."""
        return self._replace(rows=self.rows[~drop], chunks=None if self.chunks is None else self.chunks[~drop])


class Ledger:
    """What happened to rows: one entry for each that was dropped, truncated, cut into chunks or repaired."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str | int]] = []
        self.dropped: Counter[str] = Counter()  # in a word, why
        self.first: dict[str, list[str]] = {}  # of each of these words, the first rows, as `file:line: reason`

    def add(self, file: str, line: int, action: str, reason: str) -> None:
        """`action` is truncated, chunked or repaired; `lose` enters what is dropped."""
        self.entries.append({"file": file, "line": line, "action": action, "reason": reason})

    def lose(self, file: str, line: int, kind: str, reason: str) -> None:
        """A row that is dropped; `kind` says why in a word."""
        self.add(file, line, "dropped", reason)
        self.dropped[kind] += 1
        first = self.first.setdefault(kind, [])
        if len(first) < FIRST:
            first.append(f"{file}:{line}: {reason}")

    def drop(self, part: Part, drop: np.ndarray, kind: str, reason: str) -> Part:
        """`part` without the rows where `drop`, (k,) bool, is True, each of them with an entry."""
        for row in part.rows[drop]:
            self.lose(*part.store.place(row), kind, reason)
        return part.less(drop)

    def count(self, action: str) -> int:
        """Entries with this action."""
        return sum(entry["action"] == action for entry in self.entries)

    def write(self, path: Path) -> None:
        """As JSONL, in the order of files and lines."""
        entries = sorted(self.entries, key=lambda entry: (entry["file"], entry["line"]))
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        path.write_bytes(lines.encode("utf-8", "backslashreplace"))  # a file's name may be no UTF-8


class Examples:
    """The examples of one side, numbered 0 … n - 1 over its sources, each path cut to `max_length` tokens."""

    targets: Sequence[tuple[float, ...]] | None = None  # in place of the store's

    def __init__(self, parts: list[Part], max_length: int, weigh_by: Literal["rows", "tokens"] = "rows") -> None:
        self.parts, self.max_length = parts, max_length
        self.starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        measured = [_measured(part, max_length) for part in parts] or [[np.zeros(0, np.int64)] * 4]
        # Each (n,) int64: distinct tokens, trained tokens, tokens of the longest path, root-to-leaf paths.
        self.lengths, self.labels, self.longest, self.paths = map(joined, zip(*measured, strict=True))
        weights = [part.source.weight for part in parts]
        # (sources,) passes over each in an epoch
        self.passes = np.array(weights) if weigh_by == "rows" else passes_of(weights, self.tokens)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each source."""
        return [int(self.lengths[a:b].sum()) for a, b in pairwise(self.starts)]

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
        part, k = self._locate(i)
        row, (first, last) = part.rows[k], (0, 0) if part.chunks is None else part.chunks[k]
        tree = part.store.slice(row, first, last) if last else cut(part.store.tree(row), self.max_length)
        return tree if self.targets is None else tree._replace(targets=self.targets[i])

    def where(self, i: int) -> str:
        """`file:line` of example `i`, and which tokens of the text there it is, where it is a chunk."""
        part, k = self._locate(i)
        first, last = (0, 0) if part.chunks is None else part.chunks[k]
        place = "{}:{}".format(*part.store.place(part.rows[k]))
        return f"{place}, tokens {first + 1} to {last}" if last else place

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Examples of one epoch, (m,) int64: a function of its arguments alone.

        A source of n rows that p passes are made over gives round(p * n) of them. It deals its rows from one seeded
        shuffle after another and goes on where the last epoch stopped, so over the epochs all rows come equally
        often.
        """
        dealt = []
        for number, (part, start) in enumerate(zip(self.parts, self.starts, strict=False)):
            n = len(part.rows)
            if n == 0:
                continue
            count = max(1, round(self.passes[number] * n))
            first, last = epoch * count, (epoch + 1) * count
            shuffles = range(first // n, -(-last // n))
            stream = np.concatenate([np.random.default_rng([seed, 1, number, k]).permutation(n) for k in shuffles])
            dealt.append(start + stream[first - shuffles.start * n : last - shuffles.start * n])
        return np.random.default_rng([seed, 2, epoch]).permutation(joined(dealt))

    def _locate(self, i: int) -> tuple[Part, int]:
        assert 0 <= i < len(self), f"example {i} of {len(self)}"
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[which], int(i - self.starts[which])


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
    if part.chunks is not None:
        sizes = np.diff(part.chunks)[:, 0]
        in_part = sizes > 0
        lengths[in_part] = longest[in_part] = sizes[in_part]
        labels[in_part] = sizes[in_part] - 1  # all but the first, which is context
    for i in np.flatnonzero(longest > limit):
        tree = cut(store.tree(rows[i]), limit)
        lengths[i], labels[i] = sum(map(len, tree.segments)), tree.label_count
    return lengths, labels, np.minimum(longest, limit), paths


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
