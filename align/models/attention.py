"""Attention over a packed forest: one attention function, registered with transformers, for all model families.

On a GPU it is FlexAttention (Dong et al. 2024, arXiv 2412.05496) under a block mask. On a CPU it goes segment by
segment, so that its cost is the sum of squares of the segments, not the square of the row: in a C kernel where it can
(bfloat16, no window that cuts, no cap), else with like sizes together. The probabilities of long segments are computed
again in the backward pass, so that nothing of quadratic size is kept.

Shapes: H query heads, G key/value heads, T tokens in the row, D head size; b blocks of m queries and n keys in a stack.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from align.models.cpu import native
from align.models.cpu.blocks import ForestMask, Places
from align.models.cpu.compiled import WIDEST_HEAD, serve

NAME = "align_forest"
KEPT = 8  # stacks and probabilities stay for the backward pass while no larger than so many tensors like the queries


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: ForestMask | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), in transformers' attention interface."""
    assert forest is not None, "the forest layout was chosen, but the batch came without its mask"
    assert query.shape[0] == 1, query.shape
    assert not dropout, "the trunk's own dropout is off"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotation has left query and key in float32; SDPA would cast as well
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    with torch.autocast(device, enabled=False):
        if device != "cpu":
            mask = forest.tree_mask.block_mask(sliding_window)
            return flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)[0], None
        if sliding_window is not None and sliding_window >= forest.depth:
            sliding_window = None
        return _block_attention(query, key, value, forest, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, forest_attention)


@torch.compiler.disable  # its loop follows the batch's segments: a compiler would start again for every batch
def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    plain = window is None and softcap is None and query.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    if plain and serve(query, key, value):
        return _KernelAttention.apply(query, key, value, mask, scale)
    return _BlockAttention.apply(query, key, value, mask, scale, window, softcap)


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        out, logsum = native.attention(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, out, logsum)
        ctx.plan = mask, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        query, key, value, out, logsum = ctx.saved_tensors
        return *native.attention_backward(upstream, (query, key, value), *ctx.plan, out, logsum), None, None


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale, window, softcap):
        heads, groups = query.shape[1], key.shape[1]
        ctx.plan = (mask, heads, groups, scale, window, softcap)
        ctx.keeps = softcap is None and mask.size(heads, groups, query.shape[-1]) <= KEPT * query.numel()
        seen, kept = [], [] if ctx.keeps else [query, key, value]
        for number, stack in enumerate(_stacks(query, key, value, mask)):
            queries, keys, values = stack
            probabilities, _ = _probabilities(queries, keys, mask.bias(number, window, query.dtype), scale, softcap)
            seen.append(torch.bmm(probabilities, values).flatten(0, 1))
            if ctx.keeps:
                kept += [*stack, probabilities]
        ctx.save_for_backward(*kept)
        return _joined(seen).index_select(0, mask.places(heads, groups).answers).view(1, *query.shape[2:0:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        mask, heads, groups, scale, window, softcap = ctx.plan
        kept, places = ctx.saved_tensors, mask.places(heads, groups)
        above_rows, capped = upstream.reshape(-1, upstream.shape[-1]), None
        of_queries, of_keys, of_values = [], [], []
        for number, stack in enumerate(zip(*[iter(kept)] * 4, strict=True) if ctx.keeps else _stacks(*kept, mask)):
            queries, keys, values, *known = stack
            if known:
                (probabilities,) = known
            else:
                bias = mask.bias(number, window, queries.dtype)
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


def _stacks(query: Tensor, key: Tensor, value: Tensor, mask: ForestMask) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each stack queries (G * b, H / G * m, D), keys and values (G * b, n, D)."""
    places = mask.places(query.shape[1], key.shape[1])
    q, k, v = map(_flat, (query, key, value))
    for stack, of_queries, of_keys in zip(mask.stacks, places.queries, places.keys, strict=True):
        blocks = key.shape[1] * len(stack.keys)
        yield tuple(
            rows.index_select(0, chosen).view(blocks, -1, rows.shape[-1])
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
