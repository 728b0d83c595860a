"""Products with weights that stay as they are: prepared once for many calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

Linear = Callable[[Tensor], Tensor]  # (n, i) -> (n, o)


class Fixed(NamedTuple):
    """y = W x + b, with + scale * B A x where an adapter acts, everything in one dtype."""

    base: Linear
    b: Tensor | None = None  # (o, r)
    scale: float = 1.0
    a: Tensor | None = None  # (r, i); None: A x stands behind W x

    def __call__(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o), without gradient."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.base(rows)
        if self.b is not None:
            out, low = out.split(self.b.shape, -1) if self.a is None else (out, rows @ self.a.T)
            out.addmm_(low, self.b.T, alpha=self.scale)
        return out.view(*x.shape[:-1], -1)


class FixedGate(NamedTuple):
    """silu(G x) * (U x), G and U each with its B A x: their columns stand beside G's and U's, and A x beside x."""

    gate: Linear  # silu(G x)
    up: Callable[[Tensor, Tensor], Tensor]  # (x, y) -> y * (U x)
    low: Linear  # A x

    def __call__(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o), without gradient."""
        rows = x.reshape(-1, x.shape[-1])
        rows = torch.cat([rows, self.low(rows)], 1)
        return self.up(rows, self.gate(rows)).view(*x.shape[:-1], -1)


class Ready(NamedTuple):
    """Products with a frozen weight W (o, i) in both directions."""

    forward: Linear  # x W^T + b
    backward: Linear  # y W, (n, o) -> (n, i)


def both_ways(weight: Tensor, bias: Tensor | None, rows: int) -> Ready:
    """Both prepared for about so many rows at a time: two more copies of the weight."""
    return Ready(prepared(weight, bias, rows), prepared(weight.T, None, rows))


def fixed(weight: Tensor, bias: Tensor | None, rows: int, a: Tensor, b: Tensor, scale: float) -> Fixed:
    """W x + b + scale * B A x for about so many rows at a time; A (r, i), B (o, r), all of one dtype."""
    if arranges(weight):  # it is copied anyway, so A goes with it and costs no product of its own
        bias = None if bias is None else pad(bias, (0, len(a)))
        return Fixed(prepared(torch.cat([weight, a]), bias, rows), b, scale)
    return Fixed(prepared(weight, bias, rows), b, scale, a)


def fixed_gate(weight: Tensor, bias: Tensor | None, rows: int, a: Tensor, b: Tensor, scale: float) -> FixedGate:
    """For about so many rows at a time; weight (2 o, i), bias and B (2 o, r): gate's above up's; A (r, i).

    Only of weights that are arranged: oneDNN then takes activation and product along.
    """
    (gate, up), (of_gate, of_up) = (
        (None, None) if part is None else part.chunk(2) for part in (torch.cat([weight, scale * b], 1), bias)
    )
    gate, up = arranged(gate, rows), arranged(up, rows)
    multiply = torch.ops.mkldnn._linear_pointwise
    return FixedGate(
        lambda x: multiply(x, gate, of_gate, "swish", [], ""),
        lambda x, y: multiply.binary(x, y, up, of_up, "mul"),
        prepared(a, None, rows),
    )


def prepared(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """W x + b for about so many rows at a time.

    On a CPU, oneDNN rearranges a bfloat16 weight at every call, which for few rows takes as long as the product; here
    it does so once (a second copy of the weight; with 16 rows of SmolLM2 twice as fast).
    """
    if arranges(weight):
        copy = arranged(weight, rows)
        bias = None if bias is None else bias.detach()
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
    return lambda x: linear(x, weight, bias)


def arranged(weight: Tensor, rows: int) -> Tensor:
    """A copy in oneDNN's own order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def arranges(weight: Tensor) -> bool:
    """Whether preparing makes a copy of the weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
