"""Weights that stay as they are, prepared for many products: while nothing trains, and the frozen ones for a training.

Shapes: i and o a layer's input and output size, r a LoRA's rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from align.models.acceleration import plain_linear
from align.models.cpu.joined import Joined
from align.models.cpu.native import Small
from align.models.cpu.packed import COPIES, Fixed, arranges, both_ways, copies, copies_alone, prepared
from align.models.cpu.products import LoraLinear, rounded

FEW = 256  # rows up to which oneDNN's products of float32 are the faster ones
TRAINED_ROWS = 1024  # tokens that copies for a training are prepared for; with others they serve as well


@contextmanager
def fixed_products(trunk: nn.Module, rows: int) -> Iterator[None]:
    """While nothing trains: products with what acts now, joined and prepared once, for about so many rows; and those of
    layers without an adapter."""
    parts, bare = _products(trunk), _bare(trunk)
    weights = [*(_frozen(part)[0] for part in parts), *(layer.weight for layer in bare)]
    small = rows <= FEW and sum(weight.nbytes for weight in weights) <= COPIES
    try:
        with torch.no_grad():
            for part in parts:
                part.fixed = _fixed(part, rows, small)
            for layer in bare:
                if _copied(layer.weight, small):
                    layer.forward = _Prepared(layer, rows)
        yield
    finally:
        for part in parts:
            part.fixed = None
        for layer in bare:
            vars(layer).pop("forward", None)


class _Prepared:
    """The forward of a layer whose weight stays as it is; its own where another dtype or a gradient is asked for."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.plain, self.dtype = type(layer).forward.__get__(layer), layer.weight.dtype
        self.product = Fixed(prepared(layer.weight, layer.bias, rows))

    def __call__(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o)."""
        other = x.dtype != self.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        return self.plain(x) if other else self.product(x)


def _bare(trunk: nn.Module) -> list[nn.Linear]:
    """Frozen layers that no adapter of ours computes, but for the head: its product is made elsewhere."""
    elsewhere = {id(part) for layer in trunk.modules() if isinstance(layer, LoraLinear) for part in layer.modules()}
    if (head := getattr(trunk, "head", None)) is not None:
        elsewhere |= {id(part) for part in head.modules()}
    return [
        layer
        for layer in trunk.modules()
        if type(layer) is nn.Linear
        and id(layer) not in elsewhere
        and not layer.weight.requires_grad
        and "forward" not in vars(layer)
    ]


def _copied(weight: Tensor, small: bool) -> bool:
    """Whether it is prepared by a copy of it; `small`: whether rows and bytes of all are few enough."""
    return arranges(weight) or (small and copies(weight))


def sampling_bytes(trunk: nn.Module) -> int:
    """Bytes of the copies that there are while it samples, before its layers are adopted too."""
    head = getattr(trunk, "head", None)
    frozen = {
        module: module.weight.detach()
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name and not module.weight.requires_grad
    }
    layers = [weight for module, weight in frozen.items() if module is not head]
    small = sum(weight.nbytes for weight in layers) <= COPIES
    copied = [weight for weight in layers if _copied(weight, small)]
    copied += [weight for module, weight in frozen.items() if module is head and copies_alone(weight)]
    return sum(weight.nbytes for weight in copied)


def prepare_products(model: nn.Module) -> None:
    """For a training: products with frozen weights in both directions, with copies of them that are prepared once."""
    parts = {part: _frozen(part) for part in _products(model) if part.plain_product()}
    sizes = [weight.nbytes for weight, _ in parts.values() if arranges(weight)]
    if 2 * sum(sizes) <= COPIES:
        for part, (weight, bias) in parts.items():
            if arranges(weight):
                part.ready = both_ways(weight, bias, TRAINED_ROWS)


def _products(model: nn.Module) -> list[LoraLinear | Joined]:
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    groups = {id(layer.group): layer.group for layer in layers if layer.group is not None}
    return [*groups.values(), *(layer for layer in layers if layer.group is None)]


def _frozen(part: LoraLinear | Joined) -> tuple[Tensor, Tensor | None]:
    base = part if isinstance(part, Joined) else part.get_base_layer()
    return base.weight.T if isinstance(base, Conv1D) else base.weight, base.bias


def _fixed(part: LoraLinear | Joined, rows: int, small: bool) -> Fixed | None:
    """None where a layer does not multiply plainly."""
    layers = part.layers if isinstance(part, Joined) else [part]
    copied = _copied(_frozen(part)[0], small)
    if all(layer.bare for layer in layers):
        return Fixed(prepared(*_frozen(part), rows) if copied else plain_linear(*_frozen(part), rows))
    operands = part.plain_product()
    if operands is None:
        return None
    weight, bias, trained, scale, _ = operands
    if Small.serves(weight, trained):
        small = Small(trained, scale)
        a, add = small.stacked().to(weight.dtype), partial(small.up, small.packed())
    else:
        a, b = rounded(trained, weight.dtype)
        a, add = scale * a, lambda low, out: out.addmm_(low, b.T)
    if not copied:
        return Fixed(plain_linear(weight, bias, rows), add, a=a)
    bias = None if bias is None else pad(bias, (0, len(a)))  # the weight is copied anyway, so A goes with it
    return Fixed(prepared(torch.cat([weight, a]), bias, rows), add, len(a))
