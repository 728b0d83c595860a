"""Token trees: a stem of tokens with zero or more branches, packed end to end into one row without padding.

The last stem token is moved to the head of every branch, so that each position has at most one next-token label and a
branch sees exactly what it would see alone: the stem before it, then itself. Positions run along each root-to-leaf
path. The *padded* layout is the same batch type with one path per row, for models whose layers cannot follow a tree.

Shapes: R rows (1 when packed), L tokens in a row, n labels, P paths (a tree without branches is one path).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tree(NamedTuple):
    """One example: `segments[0]` is the stem, the others are branches that continue it, each from the stem's end."""

    segments: tuple[np.ndarray, ...]  # each (length,) int32 token ids; branches may not be empty
    trained: tuple[np.ndarray, ...]  # each (length,) bool, True where the token is a label (to be predicted)
    targets: tuple[float, ...] = ()  # one for each path, what is known of it: a margin, a verdict, a class; or none

    @property
    def path_count(self) -> int:
        """Root-to-leaf paths: one for each branch, or the stem alone."""
        return max(len(self.segments) - 1, 1)

    @property
    def packed_segments(self) -> tuple[int, ...]:
        """Lengths as laid out in a row: the stem gives its last token to the head of every branch."""
        stem, *branches = (len(segment) for segment in self.segments)
        return (stem - 1, *(1 + length for length in branches)) if branches else (stem,)

    @property
    def packed_length(self) -> int:
        """Tokens that this tree takes in a row."""
        return sum(self.packed_segments)

    @property
    def label_count(self) -> int:
        """Labels in all segments; the first token of all has nothing before it to be predicted from."""
        return sum(int(trained.sum()) for trained in self.trained) - bool(self.trained[0][0])

    def paths(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Every root-to-leaf path as (tokens, trained); the stem's labels count in the first path alone."""
        (stem, *branches), (stem_trained, *branch_trained) = self.segments, self.trained
        if not branches:
            return [(stem, stem_trained)]
        stems = [stem_trained] + [np.zeros_like(stem_trained)] * (len(branches) - 1)
        return [
            (np.concatenate([stem, branch]), np.concatenate([marks, trained]))
            for branch, trained, marks in zip(branches, branch_trained, stems, strict=True)
        ]


class Forest(NamedTuple):
    """A batch of trees. Labels come in the same order in both layouts: tree by tree, path by path."""

    tokens: Tensor  # (R, L) int64
    positions: Tensor  # (R, L) int64, along each path
    tree: Tensor  # (R, L) int64, which tree a token belongs to; -1 is padding
    branch: Tensor  # (R, L) int64, 0 in a stem, 1, 2, … in its branches; all 0 when padded
    where: Tensor  # (n,) int64, flat index into R * L of the position that predicts each label
    labels: Tensor  # (n,) int64, the token to predict
    path: Tensor  # (n,) int64, the path (0 … P - 1) that each label belongs to
    ends: Tensor  # (P,) int64, flat index into R * L of each path's last token
    owner: Tensor  # (P,) int64, which tree a path belongs to
    targets: Tensor  # (P,) float32, what is known of each path; 0 where nothing is
    segments: tuple[tuple[int, ...], ...] | None  # packed lengths, stem first, tree by tree; None when padded

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
    tokens, positions, tree_ids, branch_ids = [], [], [], []
    where, labels, path, ends = [], [], [], []
    start = 0
    for t, tree in enumerate(trees):
        (stem, *branches), (stem_trained, *branch_trained) = tree.segments, tree.trained
        assert len(stem), "a stem has at least one token"
        # Each packed segment with its marks shifted: position i predicts token i + 1 where that is trained.
        parts = [(stem, stem_trained[1:], 0)]
        if branches:
            parts[0] = (stem[:-1], stem_trained[1:-1], 0)
            if stem_trained[-1] and len(stem) > 1:
                # The label at the stem's end is predicted by the token before it, still in the stem.
                parts[0] = (stem[:-1], stem_trained[1:], 0)
            parts += [
                (np.concatenate([stem[-1:], branch]), trained, len(stem) - 1)
                for branch, trained in zip(branches, branch_trained, strict=True)
            ]
        for b, (part, marks, offset) in enumerate(parts):
            following = np.concatenate([part[1:], stem[-1:]]) if b == 0 and branches else part[1:]
            marked = np.flatnonzero(marks)
            where.append(start + marked)
            labels.append(following[marked])
            path.append(np.full(len(marked), len(ends) + max(b - 1, 0)))
            tokens.append(part)
            positions.append(np.arange(offset, offset + len(part)))
            tree_ids.append(np.full(len(part), t))
            branch_ids.append(np.full(len(part), b))
            start += len(part)
        lengths = tree.packed_segments
        ends += (start - 1 - np.cumsum((0, *lengths[:0:-1]))[: tree.path_count])[::-1].tolist()
    fill = -start % multiple
    tokens.append(np.zeros(fill, np.int64))
    positions.append(np.arange(fill))
    tree_ids.append(np.full(fill, -1))
    branch_ids.append(np.zeros(fill, np.int64))
    row = [_long(parts)[None] for parts in (tokens, positions, tree_ids, branch_ids)]
    segments = tuple(tree.packed_segments for tree in trees) + (((fill,),) if fill else ())
    return Forest(*row, _long(where), _long(labels), _long(path), _long([ends]), *_about(trees), segments)


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
    return Forest(*grids, _long(where), _long(labels), _long(path), _long([ends]), *_about(trees), None)


def _about(trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """Owner and target of every path."""
    assert all(len(tree.targets) in (0, tree.path_count) for tree in trees)
    owner = [t for t, tree in enumerate(trees) for _ in range(tree.path_count)]
    targets = [target for tree in trees for target in tree.targets or (0.0,) * tree.path_count]
    return _long([owner]), torch.tensor(targets, dtype=torch.float32)


def _long(parts: Sequence[np.ndarray | list[int]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


class TreeMask:
    """Who may attend to whom in a packed forest, in the form that each attention kernel wants."""

    def __init__(self, forest: Forest) -> None:
        assert forest.packed
        self.forest = forest
        self._block_masks: dict[int | None, object] = {}

    @cached_property
    def dense(self) -> Tensor:
        """(1, 1, L, L) bool, True where the row's token may attend to the column's."""
        return self._dense(self.forest.tree[0], self.forest.branch[0])[None, None]

    @staticmethod
    def _dense(tree: Tensor, branch: Tensor) -> Tensor:
        index = torch.arange(len(tree), device=tree.device)
        same = tree[:, None] == tree[None]
        own = (branch[None] == 0) | (branch[:, None] == branch[None])
        return same & own & (index[:, None] >= index[None])

    def block_mask(self, window: int | None = None) -> object:
        """A FlexAttention `BlockMask`; with `window`, only tokens less than `window` positions back."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            tree, branch, positions = self.forest.tree[0], self.forest.branch[0], self.forest.positions[0]

            def mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                own = (branch[key] == 0) | (branch[query] == branch[key])
                seen = (query >= key) & (tree[query] == tree[key]) & own
                return seen if window is None else seen & (positions[query] - positions[key] < window)

            length = self.forest.tokens.shape[1]
            self._block_masks[window] = create_block_mask(mask, 1, 1, length, length, device=tree.device)
        return self._block_masks[window]


def graft(trees: Sequence[Tree], least: int = 8) -> list[Tree]:
    """Make one tree of all that begin alike, such as with the same system prompt: it is then computed once.

    Only trees without branches, and only what none of them has to predict, is shared; below `least` tokens it is not
    worth a branch. The loss over all labels stays what it was; the order of labels may change.
    """
    groups: dict[object, list[Tree]] = {}
    for number, tree in enumerate(trees):
        alone = len(tree.segments) > 1 or len(tree.segments[0]) <= least or tree.trained[0][:least].any()
        groups.setdefault(number if alone else tree.segments[0][:least].tobytes(), []).append(tree)
    return [grafted for group in groups.values() for grafted in _graft(group)]


def _graft(group: list[Tree]) -> list[Tree]:
    if len(group) == 1:
        return group
    free = min(int(tree.trained[0].argmax()) if tree.trained[0].any() else len(tree.trained[0]) for tree in group)
    shortest = min(min(len(tree.segments[0]) for tree in group) - 1, free)
    heads = np.stack([tree.segments[0][:shortest] for tree in group])
    differing = np.flatnonzero((heads != heads[0]).any(0))
    shared = int(differing[0]) if len(differing) else shortest
    first = group[0].segments[0]
    return [
        Tree(
            (first[:shared], *(tree.segments[0][shared:] for tree in group)),
            (np.zeros(shared, bool), *(tree.trained[0][shared:] for tree in group)),
            tuple(target for tree in group for target in tree.targets),
        )
    ]
