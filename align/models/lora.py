"""peft's LoRA layer with one fused product: same weights, same files, less time and memory.

peft converts every input to the adapter's float32, keeps the copy for the backward pass and adds three tensors of the
output's size. Here the two small matrices are rounded to the trunk's dtype instead, as an autocast would, and their
product is added in place; the weights themselves, their gradients and the optimizer stay in float32.

Shapes: n tokens, i and o the layer's input and output size, r the rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from align.models.packed import Fixed
from align.recipe.schema import Lora


class Product(NamedTuple):
    """The operands of y = W x + b + scale * B A x."""

    weight: Tensor  # (o, i), frozen
    bias: Tensor | None  # (o,), frozen
    a: Tensor  # (r, i) float32
    b: Tensor  # (o, r) float32
    scale: float


class LoraLinear(lora.Linear):
    """peft's layer with `product` for its forward where one plain adapter is active."""

    group = None  # of layers that are computed together (see align.models.fused)
    fixed: Fixed | None = None  # its product prepared, while nothing trains

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(…, i) -> (…, o)."""
        if self.fixed is not None and not torch.is_grad_enabled():
            return self.fixed(x)
        if self.group is not None and not args and not kwargs:
            out = self.group.of(self, x)
            if out is not None:
                return out
        operands = None if args or kwargs else self.plain_product()
        return super().forward(x, *args, **kwargs) if operands is None else _LoraProduct.apply(x, *operands)

    def plain_product(self) -> Product | None:
        """What to multiply with; None if adapters are off, merged, several, or have dropout."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1:
            return None
        (name,) = names
        if not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        base = self.get_base_layer()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        return Product(weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])


def joined(parts: list[Product], weight: Tensor, bias: Tensor | None) -> Product:
    """Products of one input as one product, its outputs side by side: the As stacked, the scaled Bs on a diagonal.

    `weight` (sum of o, i) and `bias` are those of the parts, stacked.
    """
    a = torch.cat([part.a for part in parts])
    b = a.new_zeros(len(weight), len(a))
    row = column = 0
    for part in parts:
        height, width = part.b.shape
        torch.mul(part.b, part.scale, out=b[row : row + height, column : column + width])
        row, column = row + height, column + width
    return Product(weight, bias, a, b, 1.0)


def parted(grad_a: Tensor, grad_b: Tensor, parts: list[Product]) -> list[Tensor]:
    """Gradients of a joined product's A and B as those of its parts, A and B in turn."""
    gradients, row, column = [], 0, 0
    for part in parts:
        height, width = part.b.shape
        own = grad_b[row : row + height, column : column + width]
        gradients += [grad_a[column : column + width], own * part.scale]
        row, column = row + height, column + width
    return gradients


def product(rows: Tensor, operands: Product) -> tuple[Tensor, Tensor]:
    """rows (n, i) -> y (n, o) and the low-rank A x (n, r), kept for the backward pass."""
    weight, bias, a, b, scale = operands
    low = rows @ a.to(rows.dtype).T
    out = nn.functional.linear(rows, weight, bias)
    return out.addmm_(low, b.to(rows.dtype).T, alpha=scale), low


def product_backward(
    above: Tensor, rows: Tensor, low: Tensor, operands: Product, onto: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B from that of y, `above` (n, o); x's is added `onto` another where one is given."""
    weight, _, a, b, scale = operands
    up = above @ b.to(above.dtype)  # (n, r)
    grad_a = (up.T @ rows).to(a.dtype).mul_(scale)
    grad_b = (low.T @ above).T.to(b.dtype).mul_(scale)  # this way round is the faster product on a CPU
    grad_x = above @ weight if onto is None else onto.addmm_(above, weight)
    return grad_x.addmm_(up, a.to(above.dtype), alpha=scale), grad_a, grad_b


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        operands = Product(weight, bias, a, b, scale)
        out, low = product(rows, operands)
        ctx.save_for_backward(rows, low, weight, bias, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, low, *tensors = ctx.saved_tensors
        above = upstream.reshape(-1, upstream.shape[-1])
        grad_x, grad_a, grad_b = product_backward(above, rows, low, Product(*tensors, ctx.scale))
        return grad_x.view(ctx.shape), None, None, grad_a, grad_b, None


def lora_config(section: Lora, model: nn.Module, quantized: bool = False, scores: bool = False) -> LoraConfig:
    """peft's configuration for a recipe's `lora` section; a quantised trunk keeps peft's own layers.

    `scores`: the model has a score or class head, which is trained whole beside the adapter.
    """
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        use_rslora=section.rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    if not quantized:
        config._register_custom_module({nn.Linear: LoraLinear, Conv1D: LoraLinear})
    return config
