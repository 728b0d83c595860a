"""Token trees: a stem of tokens with zero or more branches, packed end to end into one row without padding.

Where branches begin with labels, the last stem token is moved to the head of each, so that every position has at most
one next-token label and a branch sees exactly what it would see alone: the stem before it, then itself. Positions run
along each root-to-leaf path. The *padded* layout is the same batch type with one path per row, for models whose layers
cannot follow a tree.

Shapes: R rows (1 when packed), L tokens in a row, n labels, P paths (a tree without branches is one path).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GPU_MULTIPLE = 256  # what the length of a row on a GPU is rounded up to: two blocks of FlexAttention


class Tree(NamedTuple):
    """One example: `segments[0]` is the stem, the others continue it, or each other.

    A segment stands after the one that it continues and after all that continue its elder sisters (depth first).
    """

    segments: tuple[np.ndarray, ...]  # each (length,) int32 token ids; none but the stem of one text may be empty
    trained: tuple[np.ndarray, ...]  # each (length,) bool, True where the token is a label (to be predicted)
    targets: tuple[float, ...] = ()  # one for each path, what is known of it: a margin, a verdict, a class; or none
    parents: tuple[int, ...] = ()  # of each segment but the stem, which one it continues; empty: all of them the stem
    owners: tuple[int, ...] = ()  # one for each path, which example of the batch it is of; empty: this tree's number
    notes: tuple[str, ...] = ()  # what its row's writing changed or left out, for the ledger

    def parent(self, segment: int) -> int | None:
        """The segment that one continues; None for the stem."""
        if segment == 0:
            return None
        return self.parents[segment - 1] if self.parents else 0

    @property
    def leaves(self) -> list[int]:
        """Segments that nothing continues, in order: the ends of the paths."""
        continued = {self.parent(i) for i in range(len(self.segments))}
        return [i for i in range(len(self.segments)) if i not in continued]

    @property
    def path_count(self) -> int:
        """Root-to-leaf paths."""
        return len(self.leaves)

    @property
    def handing_on(self) -> set[int]:
        """Segments whose last token has to predict the first of one that continues them: it moves to the head of all
        that do."""
        return {self.parent(i) for i, marks in enumerate(self.trained) if i and marks[0]}

    @property
    def packed_segments(self) -> tuple[int, ...]:
        """Lengths as laid out in a row."""
        moved = self.handing_on
        return tuple(len(part) + (self.parent(i) in moved) - (i in moved) for i, part in enumerate(self.segments))

    @property
    def packed_length(self) -> int:
        """Tokens that this tree takes in a row."""
        return sum(self.packed_segments)

    @property
    def label_count(self) -> int:
        """Labels in all segments; the first token of all has nothing before it to be predicted from."""
        return sum(int(trained.sum()) for trained in self.trained) - bool(self.trained[0][0])

    def lineage(self, segment: int) -> list[int]:
        """The segments of the path that ends with this one, from the stem on."""
        above = self.parent(segment)
        return [segment] if above is None else [*self.lineage(above), segment]

    def paths(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Every root-to-leaf path as (tokens, trained); labels that paths share count in the first of them alone."""
        found, counted = [], set()
        for leaf in self.leaves:
            line = self.lineage(leaf)
            marks = [self.trained[i] if i not in counted else np.zeros_like(self.trained[i]) for i in line]
            counted.update(line)
            found.append((np.concatenate([self.segments[i] for i in line]), np.concatenate(marks)))
        return found


class Forest(NamedTuple):
    """A batch of trees. Labels come in the same order in both layouts: tree by tree, path by path."""

    tokens: Tensor  # (R, L) int64
    positions: Tensor  # (R, L) int64, along each path
    tree: Tensor  # (R, L) int64, which tree a token belongs to; -1 is padding
    segment: Tensor  # (R, L) int64, which packed segment a token belongs to; all 0 when padded
    where: Tensor  # (n,) int64, flat index into R * L of the position that predicts each label
    labels: Tensor  # (n,) int64, the token to predict
    path: Tensor  # (n,) int64, the path (0 … P - 1) that each label belongs to
    ends: Tensor  # (P,) int64, flat index into R * L of each path's last token
    owner: Tensor  # (P,) int64, which example of the batch a path is of
    targets: Tensor  # (P,) float32, what is known of each path; 0 where nothing is
    distinct: int  # tokens of all trees, those that paths share counted once
    segments: tuple[int, ...] | None  # packed lengths, tree by tree; None when padded
    parents: tuple[int, ...] = ()  # the segment that each packed segment continues; -1 for a stem

    @property
    def packed(self) -> bool:
        """Whether this is the tree layout."""
        return self.segments is not None

    @property
    def paths(self) -> int:
        """P, root-to-leaf paths of all trees."""
        return len(self.ends)

    def to(self, device: torch.device | str) -> Forest:
        """The same batch with its tensors on `device`."""
        return self._replace(
            **{name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        )


def plant(trees: Sequence[Tree], *, packed: bool = True, multiple: int = 1) -> Forest:
    """Lay trees out as one batch: end to end in one row, or padded with one path per row.

    `multiple` rounds the row length up (fixed shapes on a GPU); the filling belongs to no tree.
    """
    assert trees, "a batch has at least one tree"
    return _plant_packed(trees, multiple) if packed else _plant_padded(trees, multiple)


def _plant_packed(trees: Sequence[Tree], multiple: int) -> Forest:
    tokens, positions, tree_ids, segment_ids = [], [], [], []
    where, labels, path, ends = [], [], [], []
    lengths, parents = [], []
    start = 0
    for t, tree in enumerate(trees):
        assert all(map(len, tree.segments)), "a segment has at least one token"
        base, leaves, packed, moved = len(lengths), tree.leaves, tree.packed_segments, tree.handing_on
        depth = [0]  # tokens before each segment on its path
        for i, (part, marks) in enumerate(zip(tree.segments, tree.trained, strict=True)):
            above = tree.parent(i)
            given = above in moved  # a token of the one above, which predicts the first of this one
            line, marks = (np.concatenate([tree.segments[above][-1:], part]), marks) if given else (part, marks[1:])
            if above is not None:
                depth.append(depth[above] + len(tree.segments[above]))
            leaf = bisect_left(leaves, i)  # the first path through this segment
            marked = np.flatnonzero(marks)
            where.append(start + marked)
            labels.append(line[1:][marked])
            path.append(np.full(len(marked), len(ends) + leaf))
            line = line[: packed[i]]
            tokens.append(line)
            positions.append(np.arange(len(line)) + depth[i] - given)
            tree_ids.append(np.full(len(line), t))
            segment_ids.append(np.full(len(line), len(lengths)))
            lengths.append(len(line))
            parents.append(-1 if above is None else base + above)
            start += len(line)
        edges = np.cumsum(lengths)
        ends += [int(edges[base + leaf]) - 1 for leaf in leaves]
    fill = -start % multiple
    if fill:
        tokens.append(np.zeros(fill, np.int64))
        positions.append(np.arange(fill))
        tree_ids.append(np.full(fill, -1))
        segment_ids.append(np.full(fill, len(lengths)))
        lengths.append(fill)
        parents.append(-1)
    row = [_long(parts)[None] for parts in (tokens, positions, tree_ids, segment_ids)]
    about = (*_about(trees), _distinct(trees))
    return Forest(*row, *map(_long, (where, labels, path, [ends])), *about, tuple(lengths), tuple(parents))


def _plant_padded(trees: Sequence[Tree], multiple: int) -> Forest:
    rows = [(t, tokens, trained) for t, tree in enumerate(trees) for tokens, trained in tree.paths()]
    length = max(len(tokens) for _, tokens, _ in rows)
    length += -length % multiple
    shape = (len(rows), length)
    tokens, tree_ids = np.zeros(shape, np.int64), np.full(shape, -1)
    where, labels, path, ends = [], [], [], []
    for r, (t, row, trained) in enumerate(rows):
        tokens[r, : len(row)] = row
        tree_ids[r, : len(row)] = t
        marked = np.flatnonzero(trained[1:])
        where.append(r * length + marked)
        labels.append(row[1:][marked])
        path.append(np.full(len(marked), r))
        ends.append(r * length + len(row) - 1)
    positions = np.broadcast_to(np.arange(length), shape)
    grids = [torch.from_numpy(np.array(grid, np.int64)) for grid in (tokens, positions, tree_ids, np.zeros(shape))]
    about = (*_about(trees), _distinct(trees))
    return Forest(*grids, _long(where), _long(labels), _long(path), _long([ends]), *about, None)


def _about(trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """Owner and target of every path."""
    assert all(len(tree.targets) in (0, tree.path_count) for tree in trees)
    assert len({bool(tree.owners) for tree in trees}) == 1, "either all trees name their owners, or none"
    owner = [n for t, tree in enumerate(trees) for n in tree.owners or (t,) * tree.path_count]
    targets = [target for tree in trees for target in tree.targets or (0.0,) * tree.path_count]
    return _long([owner]), torch.tensor(targets, dtype=torch.float32)


def _distinct(trees: Sequence[Tree]) -> int:
    return sum(len(part) for tree in trees for part in tree.segments)


def _long(parts: Sequence[np.ndarray | list[int]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


class TreeMask:
    """Who may attend to whom in a packed forest.

    Trees lie depth first, so a segment and all that continues it are one stretch: a key is seen by the tokens from its
    own to the end of that stretch.
    """

    def __init__(self, forest: Forest) -> None:
        assert forest.packed
        self.forest = forest

    @cached_property
    def last(self) -> Tensor:
        """(L,) int64: the token of query q sees that of key k where k <= q < last[k]."""
        ends = np.cumsum(self.forest.segments)
        for i in range(len(ends) - 1, -1, -1):
            above = self.forest.parents[i]
            if above >= 0:
                ends[above] = max(ends[above], ends[i])
        return torch.from_numpy(np.repeat(ends, self.forest.segments)).to(self.forest.tokens.device)

    @cached_property
    def dense(self) -> Tensor:
        """(1, 1, L, L) bool, True where the row's token may attend to the column's."""
        index = torch.arange(len(self.last), device=self.last.device)[:, None]
        return ((index >= index.T) & (index < self.last))[None, None]
