"""Layers that are given one input, such as query, key and value, computed as one product.

Shapes: n tokens, i and o a layer's input and output size, r a LoRA's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.models.cpu.packed import Fixed, Ready
from align.models.cpu.products import LoraLinear, Product, plain, product, product_backward, usable


def join(module: nn.Module, names: tuple[str, ...]) -> None:
    """Compute layers of these names together, where the module has them and they allow it."""
    layers = [getattr(module, name, None) for name in names]
    if not all(type(layer) is LoraLinear and layer.group is None for layer in layers):
        return
    bases = [layer.get_base_layer() for layer in layers]
    like = {(b.weight.shape[1], b.weight.dtype, b.bias is None, type(b)) for b in bases}
    if len(like) == 1 and type(bases[0]) is nn.Linear:
        group = Joined(layers)
        for layer in layers:
            layer.group = group


class Joined:
    """Layers that are given one input, such as query, key and value: their weights stacked, computed as one product.

    The first of them that is called computes all; each of the others takes its part if it is given the same tensor.
    The layers' own weights become views of the stacked ones.
    """

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers
        bases = [layer.get_base_layer() for layer in layers]
        self.weight = torch.cat([base.weight.data for base in bases])
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.data for base in bases])
        self.sizes = [len(base.weight) for base in bases]
        for base, rows in zip(bases, self.weight.split(self.sizes), strict=True):
            base.weight.data = rows
        self.fixed: Fixed | None = None  # as a layer's
        self.ready: Ready | None = None
        self.given: Tensor | None = None
        self.waiting: dict[LoraLinear, Tensor] = {}

    def plain_product(self) -> Product | None:
        """Of all layers; None if they cannot be joined now."""
        names = {layer.plain_adapter() for layer in self.layers}
        if len(names) != 1 or None in names:
            return None
        (name,) = names
        scales = {layer.scaling[name] for layer in self.layers}
        if len(scales) != 1:
            return None
        trained = tuple(part[name].weight for layer in self.layers for part in (layer.lora_A, layer.lora_B))
        return Product(self.weight, self.bias, trained, scales.pop(), self.ready)

    def settled(self, x: Tensor) -> Tensor | None:
        """All outputs side by side, where no adapter of theirs is to learn; else None."""
        if self.fixed is not None and not torch.is_grad_enabled():
            return self.fixed(x)
        if all(part.bare for part in self.layers):
            return plain(x, self.weight, self.bias, usable(self.ready))
        return None

    def of(self, layer: LoraLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x; None if it has to be computed alone."""
        if self.given is not x or layer not in self.waiting:
            self.given, self.waiting = x, {}
            if (whole := self.settled(x)) is not None:
                outputs = _apart(whole, self.sizes)
            elif operands := self.plain_product():
                outputs = _JoinedProduct.apply(x, operands, self.sizes, *operands.trained)
            else:
                return None
            self.waiting = dict(zip(self.layers, outputs, strict=True))
        out = self.waiting.pop(layer)
        if not self.waiting:
            self.given = None
        return out


def _apart(whole: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Parts (…, o) with memory of their own: who keeps one, such as the values for attention's backward pass or a
    cache, does not keep the others."""
    return tuple(torch.split_with_sizes_copy(whole, sizes, -1))


class _JoinedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, operands, sizes, *_trained):
        rows = x.reshape(-1, x.shape[-1])
        out, kept = product(rows, operands)
        ctx.save_for_backward(rows, *kept)
        ctx.operands, ctx.shape = operands, x.shape
        return _apart(out.view(*x.shape[:-1], -1), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        rows, *kept = ctx.saved_tensors
        above = torch.cat([part.reshape(len(rows), -1) for part in upstream], -1)
        grad_x, gradients = product_backward(above, rows, kept, ctx.operands, ctx.needs_input_grad[0])
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *gradients
