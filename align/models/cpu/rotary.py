"""Rotary embeddings in one autograd step: the same numbers, fewer passes over memory.

An attention module whose own function for them gives the same on random input is given this one in its place; nothing
of transformers changes for others.

Shapes: R rows, H heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.models.cpu import native
from align.models.cpu.compiled import LANES, serve

NAME = "apply_rotary_pos_emb"  # what transformers' modules call it


def fuse_rotary(model: nn.Module) -> None:
    """Give every attention module that qualifies `rotate` for its own."""
    forwards: dict[tuple[FunctionType, int], FunctionType | None] = {}
    for module in model.modules():
        forward, size = type(module).forward, getattr(module, "head_dim", None)
        own = getattr(forward, "__globals__", {}).get(NAME)
        if own is None or not isinstance(size, int) or not hasattr(module, "q_proj") or "forward" in vars(module):
            continue
        if (forward, size) not in forwards:
            forwards[forward, size] = _rebound(forward, own) if _agrees(own, size) else None
        if forwards[forward, size] is not None:
            module.forward = MethodType(forwards[forward, size], module)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q, k (R, H, T, D), cos, sin (R, T, D) -> both turned by their positions (Su et al. 2021, arXiv 2104.09864)."""
    if unsqueeze_dim == 1 and len(cos) == len(q) and q.shape[-1] % (2 * LANES) == 0 and serve(q, k, cos):
        return _KernelRotated.apply(q, cos, sin), _KernelRotated.apply(k, cos, sin)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)


class _KernelRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return native.rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return native.rotated(upstream, *ctx.saved_tensors, back=True), None, None


class _Rotated(torch.autograd.Function):
    """(y1, y2) = (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2): halves of D."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out, (x1, x2), (sin1, sin2) = x * cos, x.chunk(2, -1), sin.chunk(2, -1)
        y1, y2 = out.chunk(2, -1)
        y1.addcmul_(x2, sin1, value=-1)
        y2.addcmul_(x1, sin2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        cos, sin = ctx.saved_tensors
        out, (above1, above2), (sin1, sin2) = upstream * cos, upstream.chunk(2, -1), sin.chunk(2, -1)
        x1, x2 = out.chunk(2, -1)
        x1.addcmul_(above2, sin2)
        x2.addcmul_(above1, sin1, value=-1)
        return out, None, None


def _rebound(forward: FunctionType, own: Callable) -> FunctionType:
    """The same code, which finds `rotate` under the name; its own acts where a part of D is turned, or in float32."""

    def chosen(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: object, **named: object) -> tuple[Tensor, Tensor]:
        plain = cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype
        return (rotate if plain else own)(q, k, cos, sin, *more, **named)

    names = {**forward.__globals__, NAME: chosen}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@torch.enable_grad()
def _agrees(own: Callable, size: int) -> bool:
    """Whether a module's own function has the values and gradients of `rotate`."""
    generator, results = torch.Generator().manual_seed(0), []
    shapes = ((2, 3, 5, size), (2, 1, 5, size), (2, 5, size), (2, 5, size))
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    for run in (own, rotate):
        given = [part.clone().requires_grad_() for part in (q, k)]
        try:
            turned = run(*given, cos, sin)
            slopes = torch.autograd.grad(sum(part.square().sum() for part in turned), given)
        except (TypeError, ValueError, RuntimeError):  # it takes or gives something else
            return False
        results.append((*turned, *slopes))
    return all(
        stock.shape == ours.shape and (stock - ours).norm() <= 1e-5 * stock.norm()
        for stock, ours in zip(*results, strict=True)
    )
