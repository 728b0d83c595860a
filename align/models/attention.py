"""Attention over a packed forest: one attention function, registered with transformers, for all model families.

On a GPU it is FlexAttention (Dong et al. 2024, arXiv 2412.05496) under a block mask. On a CPU it goes segment by
segment, so that its cost is the sum of squares of the segments, not the square of the row, and recomputes the
probabilities in the backward pass: for trees of a few hundred tokens this is faster than the fused CPU kernel, and
keeps nothing of quadratic size.

Shapes: H query heads, G key/value heads, T tokens in the row, D head size; m queries and n keys in a block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from align.data.trees import Forest, TreeMask

NAME = "align_forest"
QUERY_BLOCK = 256  # queries at a time: a causal block then skips most of the keys after it
SHARED_BLOCK = 64  # segments that are together no longer than this share a block: many small products cost more


class Block(NamedTuple):
    """Queries [start, stop) see the keys of `spans`, the last of which ends with the queries themselves."""

    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]
    shared: bool = False  # by several segments, which do not all see each other


def forest_blocks(segments: tuple[int, ...], parents: tuple[int, ...]) -> list[Block]:
    """Cut every segment into query blocks, which see the segments that theirs continues, and their own up to there."""
    blocks, begin = [], 0
    before: list[tuple[tuple[int, int], ...]] = []  # of each segment, the spans that it and its ancestors take
    for length, parent in zip(segments, parents, strict=True):
        end = begin + length
        above = () if parent < 0 else before[parent]
        for first in range(begin, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            blocks.append(Block(first, last, _joined(above, begin, last)))
        before.append(_joined(above, begin, end))
        begin = end
    return _shared(blocks)


def _shared(blocks: list[Block]) -> list[Block]:
    """Neighbours that see the same keys before the first of them as one block, as long as they are short."""
    merged: list[Block] = []
    for block in blocks:
        last = merged[-1] if merged else None
        if (
            last is not None
            and block.stop - last.start <= SHARED_BLOCK
            and _before(block.spans, last.start) == _before(last.spans, last.start)
        ):
            spans = _joined(_before(last.spans, last.start), last.start, block.stop)
            merged[-1] = Block(last.start, block.stop, spans, shared=True)
        else:
            merged.append(block)
    return merged


def _before(spans: tuple[tuple[int, int], ...], place: int) -> tuple[tuple[int, int], ...]:
    return tuple((first, min(last, place)) for first, last in spans if first < place)


def _joined(spans: tuple[tuple[int, int], ...], begin: int, end: int) -> tuple[tuple[int, int], ...]:
    """The spans and one more, as one with the last where they touch."""
    if begin == end:
        return spans
    if spans and spans[-1][1] == begin:
        return (*spans[:-1], (spans[-1][0], end))
    return (*spans, (begin, end))


class ForestMask:
    """What the attention function needs of a packed batch; made once a forward pass, shared by all layers."""

    def __init__(self, forest: Forest) -> None:
        self.tree_mask = TreeMask(forest)
        self.positions = forest.positions[0]
        self.blocks = forest_blocks(forest.segments, forest.parents)
        self._biases: dict[int, Tensor] = {}

    def shared_bias(self, block: Block, dtype: torch.dtype) -> Tensor:
        """(m, n): 0 where a query of a shared block sees a key, else -inf."""
        if block.start not in self._biases:
            segment = self.tree_mask.forest.segment[0]
            queries = torch.arange(block.start, block.stop)
            keys = torch.cat([torch.arange(first, last) for first, last in block.spans])
            seen = self.tree_mask.related[segment[queries][:, None], segment[keys][None]]
            bias = torch.zeros(seen.shape, dtype=dtype)
            self._biases[block.start] = bias.masked_fill_(~(seen & (queries[:, None] >= keys)), float("-inf"))
        return self._biases[block.start]


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
        return _block_attention(query, key, value, forest, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, forest_attention)


@lru_cache(maxsize=64)
def _causal_bias(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """(m, n): 0 where seen, -inf in the upper triangle of the last m columns."""
    return torch.full((queries, keys), float("-inf"), dtype=dtype).triu_(keys - queries + 1)


def _bias(block: Block, keys: int, mask: ForestMask, window: int | None, dtype: torch.dtype) -> Tensor:
    bias = mask.shared_bias(block, dtype) if block.shared else _causal_bias(block.stop - block.start, keys, dtype)
    if window is None:
        return bias
    positions = torch.cat([mask.positions[first:last] for first, last in block.spans])
    far = mask.positions[block.start : block.stop, None] - positions[None] >= window
    return bias.masked_fill(far, float("-inf"))


def _gather(heads: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """(G, T, D) -> (G, n, D), a view where the keys lie side by side."""
    parts = [heads[:, first:last] for first, last in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _probabilities(query, key, bias, scale, softcap):
    """query (G, H/G * m, D), key (G, n, D) -> probabilities (G, H/G, m, n), tanh of the capped scores or None."""
    scores = torch.bmm(query, key.transpose(1, 2)).view(len(key), -1, *bias.shape)
    capped = None
    if softcap is None:
        scores = torch.add(bias, scores, alpha=scale)
    else:
        capped = torch.tanh(scores * (scale / softcap))
        scores = torch.add(bias, capped, alpha=softcap)
    return torch.softmax(scores, -1), capped


@torch.compiler.disable  # its loop follows the batch's segments: a compiler would start again for every batch
def _block_attention(*arguments: object) -> Tensor:
    return _BlockAttention.apply(*arguments)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale, window, softcap):
        ctx.save_for_backward(query, key, value)
        ctx.plan = (mask, scale, window, softcap)
        (heads, tokens), groups, size = query.shape[1:3], key.shape[1], value.shape[-1]
        out = torch.empty(1, tokens, heads, size, dtype=query.dtype)
        for block in mask.blocks:
            keys = _gather(key[0], block.spans)
            bias = _bias(block, keys.shape[1], mask, window, query.dtype)
            queries = query[0, :, block.start : block.stop].reshape(groups, -1, query.shape[-1])
            probabilities, _ = _probabilities(queries, keys, bias, scale, softcap)
            seen = torch.bmm(probabilities.flatten(1, 2), _gather(value[0], block.spans))
            out[0, block.start : block.stop] = seen.view(heads, -1, size).transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        query, key, value = ctx.saved_tensors
        mask, scale, window, softcap = ctx.plan
        groups = key.shape[1]
        grad_query = torch.empty_like(query)
        # Keys of a stem gather from all their blocks: summed in float32.
        grad_key = torch.zeros(key.shape[1:], dtype=torch.float32)
        grad_value = torch.zeros(value.shape[1:], dtype=torch.float32)
        for block in mask.blocks:
            keys, values = _gather(key[0], block.spans), _gather(value[0], block.spans)
            bias = _bias(block, keys.shape[1], mask, window, query.dtype)
            queries = query[0, :, block.start : block.stop].reshape(groups, -1, query.shape[-1])
            probabilities, capped = _probabilities(queries, keys, bias, scale, softcap)
            above = upstream[0, block.start : block.stop].transpose(0, 1).reshape(groups, -1, value.shape[-1])
            flat = probabilities.flatten(1, 2)
            value_part = torch.bmm(flat.transpose(1, 2), above)
            slope = torch.bmm(above, values.transpose(1, 2)).view_as(probabilities)
            slope = torch._softmax_backward_data(slope, probabilities, -1, query.dtype)
            if capped is not None:
                slope = slope * (1 - capped.square())
            slope = slope.flatten(1, 2)
            rows = torch.bmm(slope, keys).mul_(scale)
            grad_query[0, :, block.start : block.stop] = rows.view(query.shape[1], -1, query.shape[-1])
            key_part = torch.bmm(slope.transpose(1, 2), queries)
            begin = 0
            for first, last in block.spans:
                end = begin + last - first
                grad_key[:, first:last].add_(key_part[:, begin:end], alpha=scale)
                grad_value[:, first:last] += value_part[:, begin:end]
                begin = end
        return (
            grad_query,
            grad_key[None].to(key.dtype),
            grad_value[None].to(value.dtype),
            None,
            None,
            None,
            None,
        )
