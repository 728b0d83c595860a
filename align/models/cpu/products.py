"""peft's LoRA layer with one fused product: same weights, same files, less time and memory.

peft converts every input to the adapter's float32, keeps the copy for the backward pass and adds three tensors of the
output's size. Here the two small matrices are rounded to the trunk's dtype instead, as an autocast would, and their
product is added in place; the weights themselves, their gradients and the optimizer stay in float32.

Shapes: n tokens, i and o the layer's input and output size, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from align.models.cpu.native import Small
from align.models.cpu.packed import Fixed, Ready
from align.models.kept import keeps
from align.models.quantized import is_quantized


def adopt_layers(model: nn.Module) -> None:
    """Make peft's plain LoRA layers ours, with all adapters in them: the two differ in their forward pass alone."""
    for layer in model.modules():
        if type(layer) is lora.Linear and _multiplies(layer.get_base_layer()):
            layer.__class__ = LoraLinear  # as torch's own fully_shard does


def _multiplies(base: nn.Module) -> bool:
    """Whether a layer computes W x + b with its own weights, and nothing more."""
    return isinstance(base, nn.Linear | Conv1D) and not is_quantized(base) and not keeps(base)


class Product(NamedTuple):
    """The operands of y = W x + b + scale * B A x."""

    weight: Tensor  # (o, i), frozen
    bias: Tensor | None  # (o,), frozen, of the weight's dtype
    trained: tuple[Tensor, ...]  # A (r, i) and B (o, r) of each layer in turn
    scale: float
    ready: Ready | None  # products with the weight, prepared


class LoraLinear(lora.Linear):
    """peft's layer with `product` for its forward where one plain adapter is active."""

    group = None  # of layers that are computed together (see joined.py)
    fixed: Fixed | None = None  # its product prepared, while nothing trains
    ready: Ready | None = None  # those with its frozen weight, for a training

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(…, i) -> (…, o)."""
        if self.fixed is not None and not torch.is_grad_enabled():
            return self.fixed(x)
        if self.group is not None and not args and not kwargs:
            out = self.group.of(self, x)
            if out is not None:
                return out
        operands = None if args or kwargs else self.plain_product()
        if operands is None:
            ready = usable(self.ready) if self.bare else None
            return super().forward(x, *args, **kwargs) if ready is None else ready.forward(x)
        return _LoraProduct.apply(x, operands, *operands.trained)

    @property
    def bare(self) -> bool:
        """Whether its output is that of the frozen weight alone."""
        acts = not self.disable_adapters and any(name in self.lora_A for name in self.active_adapters)
        return not acts and not self.merged

    def plain_adapter(self) -> str | None:
        """The adapter that acts; None if adapters are off, merged, several, drop inputs now, or are more than B A."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
            return None
        dropout = self.lora_dropout[names[0]]
        return names[0] if isinstance(dropout, nn.Identity) or not dropout.training else None

    def plain_product(self) -> Product | None:
        """What to multiply with; None if there is no plain adapter."""
        name = self.plain_adapter()
        if name is None:
            return None
        base = self.get_base_layer()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        trained = (self.lora_A[name].weight, self.lora_B[name].weight)
        return Product(weight, base.bias, trained, self.scaling[name], self.ready)


@torch.no_grad()
def rounded(trained: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r) of layers that are given one input, from theirs in turn: the As stacked, the Bs on a
    diagonal, for their outputs stand side by side."""
    if len(trained) == 2:
        return trained[0].to(dtype), trained[1].to(dtype)
    ranks, heights = [len(a) for a in trained[::2]], [len(b) for b in trained[1::2]]
    a = trained[0].new_empty(sum(ranks), trained[0].shape[1], dtype=dtype)
    b = trained[0].new_zeros(sum(heights), sum(ranks), dtype=dtype)
    places, row, column = [], 0, 0
    for rank, height in zip(ranks, heights, strict=True):
        last, bottom = column + rank, row + height
        places += [a[column:last], b[row:bottom, column:last]]
        row, column = bottom, last
    torch._foreach_copy_(places, list(trained))
    return a, b


def usable(ready: Ready | None) -> Ready | None:
    """What is prepared, where no gradient has to find its way through it."""
    return None if torch.is_grad_enabled() else ready


def plain(rows: Tensor, weight: Tensor, bias: Tensor | None, ready: Ready | None) -> Tensor:
    """W x + b, by what is prepared if something is."""
    return nn.functional.linear(rows, weight, bias) if ready is None else ready.forward(rows)


def product(rows: Tensor, operands: Product) -> tuple[Tensor, tuple[Tensor, ...]]:
    """rows (n, i) -> y (n, o), and what the backward pass needs besides: scale * A x, and A and B where they were
    rounded."""
    weight, bias, trained, scale, ready = operands
    if Small.serves(rows, trained):
        small = Small(trained, scale)
        low = small.down(rows)
        return small.up(small.packed(), low, plain(rows, weight, bias, ready)), (low,)
    a, b = rounded(trained, weight.dtype)
    low = (rows @ a.T).mul_(scale)
    return plain(rows, weight, bias, ready).addmm_(low, b.T), (low, a, b)


def product_backward(
    above: Tensor, rows: Tensor, kept: Sequence[Tensor], operands: Product, onwards: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of x (None unless it goes `onwards`: below the first layer nothing trains) and of what is trained from
    that of y, `above` (n, o)."""
    weight, _, trained, scale, ready = operands
    low, *matrices = kept
    if matrices:
        a, b = matrices
        up = (above @ b).mul_(scale)  # (n, r)
        gradients = _parted(up.T @ rows, low.T @ above, trained)  # this way round is the faster product on a CPU
    else:
        small = Small(trained, scale)
        up, gradients = small.backward(above, rows, low)
    if not onwards:
        return None, gradients
    grad_x = above @ weight if ready is None else ready.backward(above)
    return grad_x.addmm_(up, a) if matrices else small.onwards(up, grad_x), gradients


def _parted(of_a: Tensor, of_b: Tensor, trained: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of each layer's A (r, i) and B (o, r), from those of the As stacked and of the Bs, (R, O)."""
    of_a, gradients, row, column = of_a.to(trained[0].dtype), [], 0, 0
    for own_a, own_b in zip(trained[::2], trained[1::2], strict=True):
        last, bottom = column + len(own_a), row + len(own_b)
        gradients += [of_a[column:last], torch.empty_like(own_b).copy_(of_b[column:last, row:bottom].T)]
        row, column = bottom, last
    return gradients


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, operands, *_trained):
        rows = x.reshape(-1, x.shape[-1])
        out, kept = product(rows, operands)
        ctx.save_for_backward(rows, *kept)
        ctx.operands, ctx.shape = operands, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, *kept = ctx.saved_tensors
        grad_x, gradients = product_backward(upstream.reshape(len(rows), -1), rows, kept, ctx.operands)
        return grad_x.view(ctx.shape), None, *gradients
