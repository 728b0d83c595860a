"""The memory of attention segment by segment, without its numbers: for a plan, on the meta device.

Shapes: H query heads, G key/value heads, T tokens in the row, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.models.attention import ForestMask
from align.models.cpu.blocks import Blocks
from align.models.cpu.segments import KEPT


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """What `_BlockAttention` makes, keeps and lets go of."""
    return _Traced.apply(query, key, value, mask.made(Blocks), softcap)


class _Traced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, softcap):
        heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
        numbers = blocks.size(heads, groups, size)
        ctx.keeps = softcap is None and numbers <= KEPT * query.numel()
        ctx.blocks, ctx.shapes = blocks, (query.shape, key.shape, value.shape)
        flat = [part.new_empty(part.numel()) for part in (query, key, value)]
        stacks = query.new_empty(numbers if ctx.keeps else _largest_stack(blocks, heads, groups, size))
        scores = query.new_empty(2 * _largest_scores(blocks, heads))
        del scores
        seen = query.new_empty(heads * size * sum(stack.queries.numel() for stack in blocks.stacks))
        out = query.new_empty(1, query.shape[2], heads, value.shape[3])
        ctx.save_for_backward(*([stacks] if ctx.keeps else [query, key, value]))
        del flat, seen, stacks
        return out

    @staticmethod
    def backward(ctx, above):
        (heads, groups), size = (ctx.shapes[0][1], ctx.shapes[1][1]), ctx.shapes[0][3]
        upstream = above.new_empty(above.numel())
        stacks = above.new_empty(0 if ctx.keeps else 2 * _largest_stack(ctx.blocks, heads, groups, size))
        grads = above.new_empty(sum(_stack(stack, heads, groups, size) for stack in ctx.blocks.stacks))
        slopes = above.new_empty(3 * _largest_scores(ctx.blocks, heads))
        del slopes, stacks, upstream
        out = [above.new_empty(shape) for shape in ctx.shapes]
        del grads
        return *out, None, None


def _largest_scores(blocks: Blocks, heads: int) -> int:
    """Numbers of the largest stack's scores."""
    return heads * max(stack.queries.numel() * stack.keys.shape[1] for stack in blocks.stacks)


def _stack(stack: object, heads: int, groups: int, size: int) -> int:
    """Numbers of a stack's queries, keys and values."""
    return size * (heads * stack.queries.numel() + 2 * groups * stack.keys.numel())


def _largest_stack(blocks: Blocks, heads: int, groups: int, size: int) -> int:
    return max(_stack(stack, heads, groups, size) for stack in blocks.stacks)
