"""Which queries of a packed row see which keys, as blocks of like size that are computed together.

A segment is a block, or several where it is long: a causal block then skips most of the keys after it. Many small
products cost more than few large ones, so blocks of like size are filled up to one size and stacked; kernels in C walk
along them as they are.

Shapes: H query heads, G key/value heads, T tokens in the row; b blocks of m queries and n keys in a stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.data.trees import Forest

QUERY_BLOCK = 64  # queries of a block at most: with 256, half as many keys again are computed in vain
KEY_MULTIPLE = 32  # a softmax over another number of keys takes up to twice as long
FILLED = 1.1  # blocks are stacked while what they are filled up to is no more than this times their own size,
SMALL = 16_384  # or no more than this,
LARGE = 262_144  # and never more than this: scores of a head that stay in the cache


class Block(NamedTuple):
    """Queries [start, stop) see the keys of `spans`, up to themselves; the last span ends with them."""

    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]

    @property
    def queries(self) -> int:
        """m, before it is filled up."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """n, before it is filled up."""
        return sum(last - first for first, last in self.spans)


class Stack(NamedTuple):
    """Blocks of like size; one with fewer queries or keys repeats its last."""

    queries: Tensor  # (b, m) int64, places in the row
    keys: Tensor  # (b, n) int64
    counts: Tensor  # (b, 2) int64, a block's own queries and keys


class Places(NamedTuple):
    """Where each stack's rows stand among those of all heads, token by token; and the way back."""

    queries: list[Tensor]  # (G * b * H / G * m,) int64 of each stack, indices into T * H rows
    keys: list[Tensor]  # (G * b * n,) int64, indices into T * G rows
    filling: list[Tensor]  # indices into a stack's query rows that only fill it up
    answers: Tensor  # (T * H,) int64, the row among all stacks' query rows that answers each
    uses: Tensor  # rows among all stacks' key rows, those of one key side by side
    first_use: Tensor  # (T * G,) int64, where those of each key begin


class Walks(NamedTuple):
    """The blocks as they are, one after the other, for kernels that walk along them."""

    blocks: Tensor  # (b, 4) int64: start, stop, its first span, behind its last
    spans: Tensor  # (s, 2) int64: start, stop
    trees: Tensor  # (t + 1,) int64, where the blocks of each tree begin, and where the last ends


class Blocks:
    """A packed batch as blocks; made once a forward pass, shared by all layers."""

    def __init__(self, forest: Forest) -> None:
        self.positions = forest.positions[0]
        self._blocks = lambda: forest_blocks(forest.segments, forest.parents)
        self._places: dict[tuple[int, int], Places] = {}
        self._biases: dict[object, Tensor] = {}

    @cached_property
    def stacks(self) -> list[Stack]:
        """Blocks of like size together."""
        return [_stack(blocks) for blocks in stacked(self._blocks())]

    @cached_property
    def walks(self) -> Walks:
        """The blocks in their order."""
        blocks = self._blocks()
        edges = np.cumsum([0, *(len(block.spans) for block in blocks)])
        rows = [(block.start, block.stop, *edge) for block, edge in zip(blocks, pairwise(edges), strict=True)]
        roots = np.array([block.spans[0][0] for block in blocks])
        assert (np.diff(roots) >= 0).all(), "a tree's blocks stand side by side: kernels sum its gradients in one go"
        trees = [0, *(np.flatnonzero(np.diff(roots)) + 1), len(blocks)]
        spans = [span for block in blocks for span in block.spans]
        return Walks(*(torch.from_numpy(np.array(part, np.int64)) for part in (rows, spans, trees)))

    @cached_property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return int(self.positions.max()) + 1

    def places(self, heads: int, groups: int) -> Places:
        """For H query and G key heads."""
        if (heads, groups) not in self._places:
            self._places[heads, groups] = _places(self.stacks, self.positions.shape[0], heads, groups)
        return self._places[heads, groups]

    def size(self, heads: int, groups: int, width: int) -> int:
        """Numbers in all stacks' queries, keys, values and probabilities, for heads of D = `width`."""
        queries = sum(stack.queries.numel() * (width + stack.keys.shape[1]) for stack in self.stacks)
        return heads * queries + 2 * groups * width * sum(stack.keys.numel() for stack in self.stacks)

    def bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Of a stack, (b, 1, m, n): 0 where a query sees a key, else -inf."""
        if (number, window, dtype) not in self._biases:
            queries, keys, counts = self.stacks[number]
            own = torch.arange(keys.shape[1]) < counts[:, 1:]
            seen = own[:, None] & (queries[:, :, None] >= keys[:, None])
            if window is not None:
                seen &= self.positions[queries][:, :, None] - self.positions[keys][:, None] < window
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
            self._biases[number, window, dtype] = bias[:, None]
        return self._biases[number, window, dtype]


def forest_blocks(segments: Sequence[int], parents: Sequence[int]) -> list[Block]:
    """Cut every segment into query blocks, which see the segments that theirs continues, and their own up to there."""
    blocks, begin = [], 0
    before: list[tuple[tuple[int, int], ...]] = []  # of each segment, the spans that it and its ancestors take
    for length, parent in zip(segments, parents, strict=True):
        end = begin + length
        above = () if parent < 0 else before[parent]
        for first in range(begin, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            blocks.append(Block(first, last, (*above, (begin, last))))
        before.append((*above, (begin, end)) if length else above)
        begin = end
    return blocks


def stacked(blocks: list[Block]) -> list[list[Block]]:
    """Blocks of like size together, each stack's first the one with most to compute."""
    open_stacks: list[tuple[list[Block], int, int, int]] = []  # with m, n, and the size of its blocks themselves
    for block in sorted(blocks, key=lambda block: (-block.queries * _filled(block), block.start)):
        own = block.queries * _filled(block)
        for i, (together, m, n, size) in enumerate(open_stacks):
            m, n, size = max(m, block.queries), max(n, _filled(block)), size + own
            whole = (len(together) + 1) * m * n
            if whole <= LARGE and whole <= max(FILLED * size, SMALL):
                open_stacks[i] = ([*together, block], m, n, size)
                break
        else:
            open_stacks.append(([block], block.queries, _filled(block), own))
    return [together for together, *_ in open_stacks]


def _filled(block: Block) -> int:
    return -(-block.keys // KEY_MULTIPLE) * KEY_MULTIPLE


def _stack(blocks: list[Block]) -> Stack:
    m, n = max(block.queries for block in blocks), max(_filled(block) for block in blocks)
    last = np.array([block.stop - 1 for block in blocks])[:, None]
    counts = np.array([(block.queries, block.keys) for block in blocks])
    queries = np.minimum(np.array([block.start for block in blocks])[:, None] + np.arange(m), last)
    keys = np.repeat(last, n, 1)
    for row, block in zip(keys, blocks, strict=True):
        row[: block.keys] = np.concatenate([np.arange(first, end) for first, end in block.spans])
    return Stack(*map(torch.from_numpy, (queries, keys, counts)))


def _places(stacks: list[Stack], tokens: int, heads: int, groups: int) -> Places:
    """Rows of a stack are laid group by group, block by block; a block's queries head by head."""
    head, group = torch.arange(heads).view(groups, 1, -1, 1), torch.arange(groups).view(groups, 1, 1)
    queries, keys, own_queries, own_keys = [], [], [], []
    for places, seen, counts in stacks:
        queries.append(places[:, None] * heads + head)  # (G, b, H / G, m)
        keys.append(seen * groups + group)  # (G, b, n)
        own_queries.append((torch.arange(places.shape[1]) < counts[:, :1])[:, None].expand_as(queries[-1]).flatten())
        own_keys.append((torch.arange(seen.shape[1]) < counts[:, 1:]).expand_as(keys[-1]).flatten())
    queries, keys = [part.flatten() for part in queries], [part.flatten() for part in keys]
    answering = torch.cat(own_queries).nonzero()[:, 0]
    answers = torch.empty(tokens * heads, dtype=torch.long)
    answers[torch.cat(queries)[answering]] = answering
    used = torch.cat(own_keys).nonzero()[:, 0]
    key_of = torch.cat(keys)[used]
    counts = key_of.bincount(minlength=tokens * groups)
    uses, first_use = used[key_of.argsort(stable=True)], counts.cumsum(0) - counts
    return Places(queries, keys, [(~own).nonzero()[:, 0] for own in own_queries], answers, uses, first_use)
