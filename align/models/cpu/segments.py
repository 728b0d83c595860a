"""Attention over a packed forest segment by segment: its cost is the sum of squares of the segments, not of the row.

It runs in a C kernel where it can (bfloat16, no window that cuts, no cap), else blocks of like size are computed
together. The probabilities of long segments are computed again in the backward pass, so that nothing of quadratic size
is kept.

Shapes: H query heads, G key/value heads, T tokens in the row, D head size; b blocks of m queries and n keys in a stack.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.models.attention import ForestMask
from align.models.cpu import native
from align.models.cpu.blocks import Blocks, Places
from align.models.cpu.compiled import WIDEST_HEAD, serve

KEPT = 8  # stacks and probabilities stay for the backward pass while no larger than so many tensors like the queries


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """What `dense_attention` computes."""
    blocks = mask.made(Blocks)
    if window is not None and window >= blocks.depth:
        window = None
    plain = window is None and softcap is None and query.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    if plain and serve(query, key, value):
        return _KernelAttention.apply(query, key, value, blocks, scale)
    return _BlockAttention.apply(query, key, value, blocks, scale, window, softcap)


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scale):
        out, logsum = native.attention(query, key, value, blocks, scale)
        ctx.save_for_backward(query, key, value, out, logsum)
        ctx.plan = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        query, key, value, out, logsum = ctx.saved_tensors
        return *native.attention_backward(upstream, (query, key, value), *ctx.plan, out, logsum), None, None


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scale, window, softcap):
        heads, groups = query.shape[1], key.shape[1]
        ctx.plan = (blocks, heads, groups, scale, window, softcap)
        ctx.keeps = softcap is None and blocks.size(heads, groups, query.shape[-1]) <= KEPT * query.numel()
        seen, kept = [], [] if ctx.keeps else [query, key, value]
        for number, stack in enumerate(_stacks(query, key, value, blocks)):
            queries, keys, values = stack
            probabilities, _ = _probabilities(queries, keys, blocks.bias(number, window, query.dtype), scale, softcap)
            seen.append(torch.bmm(probabilities, values).flatten(0, 1))
            if ctx.keeps:
                kept += [*stack, probabilities]
        ctx.save_for_backward(*kept)
        return _joined(seen).index_select(0, blocks.places(heads, groups).answers).view(1, *query.shape[2:0:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        blocks, heads, groups, scale, window, softcap = ctx.plan
        kept, places = ctx.saved_tensors, blocks.places(heads, groups)
        above_rows, capped = upstream.reshape(-1, upstream.shape[-1]), None
        of_queries, of_keys, of_values = [], [], []
        for number, stack in enumerate(zip(*[iter(kept)] * 4, strict=True) if ctx.keeps else _stacks(*kept, blocks)):
            queries, keys, values, *known = stack
            if known:
                (probabilities,) = known
            else:
                bias = blocks.bias(number, window, queries.dtype)
                probabilities, capped = _probabilities(queries, keys, bias, scale, softcap)
            above = above_rows.index_select(0, places.queries[number])
            above = above.index_fill_(0, places.filling[number], 0.0).view(*queries.shape[:2], -1)
            of_values.append(torch.bmm(probabilities.transpose(1, 2), above).flatten(0, 1))
            slope = torch.bmm(above, values.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, probabilities, -1, queries.dtype)
            if capped is not None:
                slope = slope * (1 - capped.square())
            of_queries.append(torch.bmm(slope, keys).mul_(scale).flatten(0, 1))
            of_keys.append(torch.bmm(slope.transpose(1, 2), queries).mul_(scale).flatten(0, 1))
        return (
            _unflat(_joined(of_queries).index_select(0, places.answers), heads),
            _unflat(_summed(_joined(of_keys), places), groups),
            _unflat(_summed(_joined(of_values), places), groups),
            *[None] * 4,
        )


def _stacks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each stack queries (G * b, H / G * m, D), keys and values (G * b, n, D)."""
    places = blocks.places(query.shape[1], key.shape[1])
    q, k, v = map(_flat, (query, key, value))
    for stack, of_queries, of_keys in zip(blocks.stacks, places.queries, places.keys, strict=True):
        count = key.shape[1] * len(stack.keys)
        yield tuple(
            rows.index_select(0, chosen).view(count, -1, rows.shape[-1])
            for rows, chosen in ((q, of_queries), (k, of_keys), (v, of_keys))
        )


def _flat(heads: Tensor) -> Tensor:
    """(1, H, T, D) -> (T * H, D), token by token."""
    return heads[0].transpose(0, 1).reshape(-1, heads.shape[-1])


def _unflat(rows: Tensor, heads: int) -> Tensor:
    """(T * H, D) -> (1, H, T, D)."""
    return rows.view(-1, heads, rows.shape[-1]).transpose(0, 1)[None]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed(parts: Tensor, places: Places) -> Tensor:
    """Every key's gradient, (T * G, D): keys of a stem gather from all blocks that see them, summed in float32."""
    return torch.embedding_bag(parts, places.uses, places.first_use, False, 0, False, None, False)[0]


def _probabilities(queries, keys, bias, scale, softcap):
    """Queries (G * b, H / G * m, D), keys (G * b, n, D), bias (b, 1, m, n) -> probabilities (G * b, H / G * m, n), and
    tanh of the capped scores or None."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    shape, capped = scores.shape, None
    scores = scores.view(len(queries) // len(bias), len(bias), -1, *bias.shape[2:])
    if softcap is None:
        scores = torch.add(bias, scores, alpha=scale)
    else:
        capped = torch.tanh(scores * (scale / softcap))
        scores = torch.add(bias, capped, alpha=softcap)
        capped = capped.view(shape)
    return torch.softmax(scores, -1).view(shape), capped
