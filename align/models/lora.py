"""peft's LoRA layer with one fused product: same weights, same files, less time and memory.

peft converts every input to the adapter's float32, keeps the copy for the backward pass and adds three tensors of the
output's size. Here the two small matrices are rounded to the trunk's dtype instead, as an autocast would, and their
product is added in place; the weights themselves, their gradients and the optimizer stay in float32.

Shapes: n tokens, i and o the layer's input and output size, r the rank.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from align.recipe.schema import Lora


class LoraLinear(lora.Linear):
    """y = W x + b + scale * B A x."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(…, i) -> (…, o)."""
        base = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(names) == 1 and isinstance(self.lora_dropout[names[0]], nn.Identity) and not self.merged
        if self.disable_adapters or not plain or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, weight, base.bias, a, b, self.scaling[name])


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        down = rows @ a.to(x.dtype).T  # (n, r)
        out = nn.functional.linear(rows, weight, bias)
        out.addmm_(down, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, down, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, down, weight, a, b = ctx.saved_tensors
        above = upstream.reshape(-1, upstream.shape[-1])
        up = above @ b.to(above.dtype)  # (n, r)
        grad_a = (up.T @ rows).to(a.dtype).mul_(ctx.scale)
        grad_b = (above.T @ down).to(b.dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = above @ weight
            grad_x = grad_x.addmm_(up, a.to(above.dtype), alpha=ctx.scale).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


def lora_config(section: Lora, model: nn.Module, quantized: bool = False) -> LoraConfig:
    """peft's configuration for a recipe's `lora` section; a quantised trunk keeps peft's own layers."""
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        use_rslora=section.rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    if not quantized:
        config._register_custom_module({nn.Linear: LoraLinear, Conv1D: LoraLinear})
    return config
