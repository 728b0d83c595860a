"""Products with weights that stay as they are for a while, as in sampling: prepared once for many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

Linear = Callable[[Tensor], Tensor]  # (n, i) -> (n, o)


class Fixed(NamedTuple):
    """y = W x + b, with + scale * B A x where an adapter acts, everything in one dtype."""

    base: Linear
    a: Tensor | None = None  # (r, i)
    b: Tensor | None = None  # (o, r)
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o), without gradient."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.base(rows)
        if self.a is not None:
            out.addmm_(rows @ self.a.T, self.b.T, alpha=self.scale)
        return out.view(*x.shape[:-1], -1)


def prepared(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """W x + b for about so many rows at a time.

    On a CPU, oneDNN rearranges a bfloat16 weight at every call, which for few rows takes as long as the product; here
    it does so once (a second copy of the weight; with 16 rows of SmolLM2 twice as fast).
    """
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        arranged = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        bias = None if bias is None else bias.detach()
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, arranged, bias, "none", [], "")
    return lambda x: linear(x, weight, bias)
