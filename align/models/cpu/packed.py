"""Products with weights that stay as they are: prepared once for many calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from align.models.acceleration import Linear

COPIES = 2**31  # bytes that prepared copies may take where products go without them too


class Fixed(NamedTuple):
    """y = W x + b, with + scale * B A x where an adapter acts, everything in one dtype."""

    base: Linear
    add: Callable[[Tensor, Tensor], Tensor] | None = None  # (low, out): out + B low, in place
    rank: int = 0  # how many columns of the base's output are low, scale * A x: they stand behind W x
    a: Tensor | None = None  # scale * A (r, i), where low is a product of its own

    def __call__(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o), without gradient."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.base(rows)
        if self.add is not None:
            width = out.shape[1] - self.rank
            out = self.add(out[:, width:] if self.a is None else rows @ self.a.T, out[:, :width])
        return out.view(*x.shape[:-1], out.shape[1])


class Ready(NamedTuple):
    """Products with a frozen weight W (o, i) in both directions."""

    forward: Linear  # x W^T + b
    backward: Linear  # y W, (n, o) -> (n, i)


def both_ways(weight: Tensor, bias: Tensor | None, rows: int) -> Ready:
    """Both prepared for about so many rows at a time: two more copies of the weight."""
    return Ready(prepared(weight, bias, rows), prepared(weight.T, None, rows))


def prepared(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """W x + b for about so many rows at a time.

    oneDNN rearranges a bfloat16 weight at every call, which for few rows takes as long as the product; here it does so
    once (a second copy of the weight; with 16 rows of SmolLM2 twice as fast). Of float32 products PyTorch's own library
    makes as few rows slowly where the processor is not Intel's.
    """
    if copies(weight):
        copy = arranged(weight, rows)
        bias = None if bias is None else bias.detach()
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
    return lambda x: linear(x, weight, bias)


def alone(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """The same for one weight whose copy nobody else counts, such as a head's."""
    return prepared(weight, bias, rows) if copies_alone(weight) else partial(linear, weight=weight, bias=bias)


def copies_alone(weight: Tensor) -> bool:
    """Whether `alone` makes a copy."""
    return arranges(weight) or (copies(weight) and weight.nbytes <= COPIES)


def arranged(weight: Tensor, rows: int) -> Tensor:
    """A copy in oneDNN's own order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def copies(weight: Tensor) -> bool:
    """Whether preparing makes a copy of the weight, for few rows at a time."""
    floats = _plain(weight) and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return floats or arranges(weight)


def arranges(weight: Tensor) -> bool:
    """Whether it has to be laid out for every product, so that a copy pays for any number of rows."""
    return _plain(weight) and weight.dtype == torch.bfloat16 and _multiplies_bfloat16()


def _plain(weight: Tensor) -> bool:
    """On a CPU, and no part of a sharded weight."""
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu"


@cache
def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
