"""FlexAttention (Dong et al. 2024, arXiv 2412.05496) over a packed forest.

A key k is seen by the queries k <= q < last[k] (`TreeMask`), with a sliding window only while position[q] < near[k]. So
the least and the largest `last` of a block of keys tell whether all, some or none of a block of queries see it.

One function is compiled, for rows of any length. All that differs from row to row comes as a tensor: another mask is no
reason to compile again. Without a compiled function FlexAttention would write out dense scores, so there is a limit to
its variants at which it fails.

Shapes: H query heads, G key/value heads, T tokens in the row, D head size, B blocks of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo import config, mark_static
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as flex

from align.data.trees import Forest, TreeMask
from align.models.attention import ForestMask

BLOCK = 128  # tokens
VARIANTS = 64  # of the compiled function: heads, dtypes, with a gradient and without, with a window, for two models
BACKEND = "inductor"
SETTINGS = {"recompile_limit": VARIANTS, "fail_on_recompile_limit_hit": True, "specialize_float": True}


class Seen(NamedTuple):
    """Which blocks see which, and what tells it token by token; one set of tensors for all layers."""

    last: Tensor  # (T,) int64
    near: Tensor | None  # (T,) int64, with a window
    positions: Tensor  # (T,) int64
    blocks: tuple[Tensor, ...]  # of `BlockMask`, int32: counts (1, 1, B) and numbers (1, 1, B, B), four times


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """What `dense_attention` computes; T is a multiple of BLOCK, and more than one."""
    seen = mask.made(_seen(window))
    for part in (query, key, value):  # else a row of as many blocks as there are heads would pass for them
        mark_static(part, 1)
        mark_static(part, 3)
    with config.patch(SETTINGS):
        return _compiled()(query, key, value, seen, scale, softcap).transpose(1, 2)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attend, dynamic=True, fullgraph=True, backend=BACKEND)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float, softcap: float | None) -> Tensor:
    """(1, H, T, D)."""
    last, near, positions, blocks = seen

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k <= q) & (q < last[k])
        return own if near is None else own & (positions[q] < near[k])

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    mask = BlockMask((query.shape[2], key.shape[2]), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    return flex(query, key, value, None if softcap is None else capped, mask, scale, enable_gqa=True)


@cache
def _seen(window: int | None) -> Callable[[Forest], Seen]:
    return partial(seen_of, window=window)


def seen_of(forest: Forest, window: int | None) -> Seen:
    """What a forest's queries see, of tokens less than `window` positions back."""
    last, positions = TreeMask(forest).last, forest.positions[0]
    near = None if window is None else positions + window
    some, whole = seen_blocks(last, positions, near)
    blocks = tuple(part for each in (some, whole, some.T, whole.T) for part in _listed(each))
    return Seen(last, near, positions, blocks)


def seen_blocks(last: Tensor, positions: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, B) bool each: where the row's queries see some keys of the column's, or may; and where each sees all."""
    assert len(last) % BLOCK == 0, len(last)
    keys = last.view(-1, BLOCK)
    first = torch.arange(len(keys), device=last.device)[:, None] * BLOCK  # query of each block
    own, before = first == first.T, first > first.T
    whole = before & (first + BLOCK - 1 < keys.amin(1))
    some = own | before & (first < keys.amax(1))
    if near is None:
        return some & ~whole, whole
    return some & (positions.view(-1, BLOCK).amin(1)[:, None] < near.view(-1, BLOCK).amax(1)), torch.zeros_like(whole)


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row how many there are, and which, those first: (1, 1, B) and (1, 1, B, B) int32."""
    seen = seen.to(torch.int32, memory_format=torch.contiguous_format)[None, None]
    return seen.sum(-1, dtype=torch.int32), seen.argsort(dim=-1, descending=True, stable=True).int()
