"""Norms and gated MLPs in one autograd step each: the same numbers, fewer passes over memory, half of it kept.

The stock modules keep a float32 copy of every normalised input and four tensors of the MLP's width for the backward
pass; these keep the input, and gate and up, and compute the rest again. Which modules qualify is tried, not looked up:
a module that looks right is run both ways on random input, and is left alone unless value and gradient agree.

Shapes: n tokens, d hidden size, h the MLP's width, r a LoRA's rank.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from align.models.lora import LoraLinear, Product, product, product_backward


def fuse(model: nn.Module) -> None:
    """Give every module that qualifies its fused forward."""
    verdicts: dict[tuple[type, type | None], bool] = {}
    for module in model.modules():
        forward = _norm_forward if _is_norm(module) else _mlp_forward if _is_gated_mlp(module) else None
        if forward is None:
            continue
        kind = (type(module), type(getattr(module, "act_fn", None)))
        if kind not in verdicts:
            verdicts[kind] = _agrees(module, forward)
        if verdicts[kind]:
            module.forward = MethodType(forward, module)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
    return silu and all(isinstance(part, LoraLinear) for part in parts)


@torch.enable_grad()
def _agrees(module: nn.Module, forward) -> bool:
    """Whether the fused forward gives the module's own value and input gradient, in the module's own dtype."""
    weight = next(module.parameters())
    width = module.gate_proj.in_features if hasattr(module, "gate_proj") else weight.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=generator).to(weight.device, weight.dtype).requires_grad_()
    results = []
    for run in (type(module).forward, forward):
        out = run(module, x)
        results.append((out.detach().float(), torch.autograd.grad(out.float().square().sum(), x)[0].float()))
    for stock, fused in zip(*results, strict=True):
        tolerance = 1e-5 if weight.dtype == torch.float32 else 0.03
        if stock.shape != fused.shape or (stock - fused).norm() > tolerance * stock.norm():
            return False
    return True


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _RmsNorm(torch.autograd.Function):
    """y = w * x / rms(x) (Zhang & Sennrich 2019, arXiv 1910.07467), statistics in float32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (…, 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, weight, scale = ctx.saved_tensors
        unit = x.float().mul_(scale)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (upstream.float() * unit).flatten(0, -2).sum(0).to(weight.dtype)
        slope = (upstream * weight).float()
        along = (slope * unit).mean(-1, keepdim=True)
        slope.sub_(unit.mul_(along)).mul_(scale)
        return slope.to(x.dtype), grad_weight, None


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    products = [part.plain_product() for part in (self.gate_proj, self.up_proj, self.down_proj)]
    if any(p is None for p in products) or not torch.is_grad_enabled():
        return type(self).forward(self, x)
    return _GatedMlp.apply(x, *(value for p in products for value in p))


class _GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), each with its LoRA."""

    @staticmethod
    def forward(ctx, x, *values):
        gate_product, up_product, down_product = (Product(*values[i : i + 5]) for i in (0, 5, 10))
        rows = x.reshape(-1, x.shape[-1])
        gate, gate_low = product(rows, gate_product)  # (n, h), (n, r)
        up, up_low = product(rows, up_product)
        out, down_low = product(nn.functional.silu(gate).mul_(up), down_product)
        tensors = [value for p in (gate_product, up_product, down_product) for value in p[:4]]
        ctx.save_for_backward(rows, gate, up, gate_low, up_low, down_low, *tensors)
        ctx.shape, ctx.scales = x.shape, [p.scale for p in (gate_product, up_product, down_product)]
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, gate, up, gate_low, up_low, down_low, *tensors = ctx.saved_tensors
        gate_product, up_product, down_product = (
            Product(*tensors[4 * i : 4 * i + 4], scale) for i, scale in enumerate(ctx.scales)
        )
        above = upstream.reshape(-1, upstream.shape[-1])
        active = nn.functional.silu(gate)
        grad_mid, down_a, down_b = product_backward(above, active * up, down_low, down_product)
        grad_up = active.mul_(grad_mid)
        grad_gate = torch.ops.aten.silu_backward(grad_mid.mul_(up), gate)
        grad_x, up_a, up_b = product_backward(grad_up, rows, up_low, up_product)
        grad_x, gate_a, gate_b = product_backward(grad_gate, rows, gate_low, gate_product, onto=grad_x)
        return (
            grad_x.view(ctx.shape),
            *(None, None, gate_a, gate_b, None),
            *(None, None, up_a, up_b, None),
            *(None, None, down_a, down_b, None),
        )
