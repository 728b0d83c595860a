"""Norms and gates as one kernel each, made by a compiler from the formulas.

Between the large products a layer reads and writes the same states many times. Each function here reads its input once
and writes its output once. Sizes of tokens are dynamic, so that a function is compiled once for each width and dtype.

Shapes: n tokens, d hidden size, h the MLP's width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._dynamo import config, mark_static
from torch.fx.experimental import _config as shapes
from torch.nn.functional import silu

SETTINGS = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True, "specialize_float": True}
BACKEND = "inductor"


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (…, d) -> w * x / rms(x), and 1 / rms(x), (…, 1) float32."""
    out, scale = _run(_norm, x.reshape(-1, x.shape[-1]), weight, eps)
    return out.view(x.shape), scale.view(*x.shape[:-1], 1)


def norm_backward(above: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x, (…, d)."""
    rows = (part.reshape(-1, part.shape[-1]) for part in (above, x, scale))
    return _run(_norm_backward, *rows, weight).view(x.shape)


def gated(both: Tensor) -> Tensor:
    """Gate and up side by side, (n, 2h) -> silu(gate) * up, (n, h)."""
    return _run(_gated, both)


def gated_backward(both: Tensor, above: Tensor) -> Tensor:
    """The gradient of `both`, (n, 2h), from that of silu(gate) * up, `above` (n, h)."""
    return _run(_gated_backward, both, above)


@cache
def missing() -> str:
    """Why the functions cannot be compiled here; empty where they can."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(4, 8, device=device)
    try:
        norm(x, x[0], 1e-6)
    except Exception as error:  # of whatever kind: compilers have their own
        return " ".join((str(error) or repr(error)).splitlines()[:2])
    return ""


def _run(function: Callable, first: Tensor, *more: Tensor | float) -> Tensor | tuple[Tensor, Tensor]:
    if len(first) == 1:  # another size for a compiler, and no work
        return function(first, *more)
    given = [part.detach() if isinstance(part, Tensor) else part for part in (first, *more)]
    for part in given:
        if isinstance(part, Tensor):
            mark_static(part, part.ndim - 1)  # widths: a kernel then holds a whole row
    with config.patch(SETTINGS), shapes.patch(use_duck_shape=False):  # equal sizes are chance
        return _compiled(function)(*given)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True, fullgraph=True, backend=BACKEND)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def _norm_backward(above: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    unit, slope = x.float() * scale, (above * weight).float()
    return ((slope - unit * (slope * unit).mean(-1, keepdim=True)) * scale).to(x.dtype)


def _gated(both: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, -1)
    return (silu(gate).to(both.dtype) * up).to(both.dtype)


def _gated_backward(both: Tensor, above: Tensor) -> Tensor:
    (gate, up), above = both.float().chunk(2, -1), above.float()
    share = torch.sigmoid(gate)
    return torch.cat([above * up * share * (1 + gate * (1 - share)), above * gate * share], -1).to(both.dtype)
