"""Norms, gated MLPs and rotary embeddings in one autograd step each: the same numbers, fewer passes over memory, less
of it kept.

The stock modules keep a float32 copy of every normalised input and four tensors of the MLP's width for the backward
pass; these keep the input, gate and up (and, where C kernels do it, silu(gate) * up), and compute the rest again. Which
modules qualify is tried, not looked up: a module that looks right is run both ways on random input, and is left alone
unless value and gradient agree.

Shapes: n tokens, d hidden size, h the MLP's width, r a LoRA's rank.
"""

from __future__ import annotations

from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from align.models.cpu import native, rotary
from align.models.cpu.compiled import LANES, serve
from align.models.cpu.joined import join
from align.models.cpu.products import LoraLinear, adopt_layers, product, product_backward

VECTORS = 64  # numbers: what PyTorch's loops take at once, at most
KERNELS: dict[str, ModuleType] = {}  # by device: functions of `native`, from elsewhere


def fuse(model: nn.Module, joins: bool = True) -> None:
    """Give every module that qualifies its fused forward. Again for adapters that were added. `joins`: layers of one
    input become one product, for which their weights are stacked in a tensor beside the parameters."""
    adopt_layers(model)
    verdicts: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        if joins:
            join(module, ("q_proj", "k_proj", "v_proj"))
            join(module, ("gate_proj", "up_proj"))
        if "forward" in vars(module):
            continue
        if _is_norm(module) or _is_gated_mlp(module):
            forward = _norm_forward if _is_norm(module) else _mlp_forward
            kind, agrees = (type(module), type(getattr(module, "act_fn", None))), partial(_agrees, forward=forward)
        elif rotary.is_attention(module):
            forward, kind, agrees = rotary.attention_forward, rotary.kind_of(module), rotary.agrees
        else:
            continue
        if kind not in verdicts:
            verdicts[kind] = agrees(module)
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
    if weight.is_meta:  # a plan is made of it: there are no numbers to compare
        return True
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
        if kernels := _kernels(x, weight):
            out, scale = kernels.norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return out
        wide = x.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (…, 1)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return weight * wide.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, weight, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and (kernels := _kernels(x, weight)):
            return kernels.norm_backward(upstream, x, weight, scale), None, None
        unit = x.to(torch.float32, copy=True).mul_(scale)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (upstream.float() * unit).flatten(0, -2).sum(0).to(weight.dtype)
        slope = (upstream * weight).to(torch.float32, copy=True)
        along = (slope * unit).mean(-1, keepdim=True)
        slope.sub_(unit.mul_(along)).mul_(scale)
        return slope.to(x.dtype), grad_weight, None


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    group = getattr(self.gate_proj, "group", None)
    hooked = self.gate_proj._forward_hooks or self.up_proj._forward_hooks  # what they add is seen where they are called
    if group is None or hooked:
        return type(self).forward(self, x)
    if not torch.is_grad_enabled() and (both := group.settled(x)) is not None:
        return self.down_proj(_gated(both.flatten(0, -2)).view(*x.shape[:-1], -1))
    both, down = group.plain_product(), self.down_proj.plain_product()
    if both is None or down is None:
        return type(self).forward(self, x)
    return _GatedMlp.apply(x, both, down, *both.trained, *down.trained)


def _gated(both: Tensor) -> Tensor:
    """Gate and up side by side, (n, 2h) -> silu(gate) * up."""
    if kernels := _of_gates(both):
        return kernels.gated(both)
    gate, up = both.chunk(2, -1)
    return _active(gate) * up


def _active(gate: Tensor) -> Tensor:
    """silu of a part of wider rows, (n, h), to the bit as of a tensor of its own: PyTorch computes what is left at the
    end of a row by other instructions than what fills a vector."""
    return nn.functional.silu(gate.contiguous() if gate.shape[1] % VECTORS else gate)


def _kernels(*tensors: Tensor) -> ModuleType | None:
    return KERNELS.get(tensors[0].device.type) or (native if serve(*tensors) else None)


def _of_gates(both: Tensor) -> ModuleType | None:
    kernels = _kernels(both)
    return None if kernels is native and both.shape[1] % (2 * LANES) else kernels


class _GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), each with its LoRA; gate and up as one product."""

    @staticmethod
    def forward(ctx, x, gate_and_up, down, *_trained):
        rows = x.reshape(-1, x.shape[-1])
        both, both_kept = product(rows, gate_and_up)  # (n, 2h): gate, up
        middle = _gated(both)
        kept = middle if _of_gates(both) is native else None  # elsewhere memory is dearer than computing it again
        out, down_kept = product(middle, down)
        ctx.save_for_backward(rows, both, kept, *both_kept, *down_kept)
        ctx.operands, ctx.shape, ctx.count = (gate_and_up, down), x.shape, len(both_kept)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, both, kept, *of_products = ctx.saved_tensors
        (gate_and_up, down), both_kept, down_kept = ctx.operands, of_products[: ctx.count], of_products[ctx.count :]
        above = upstream.reshape(-1, upstream.shape[-1])
        if kept is not None:
            grad_mid, of_down = product_backward(above, kept, down_kept, down)
            grads = native.gated_backward(both, grad_mid)
        elif kernels := _of_gates(both):
            grad_mid, of_down = product_backward(above, kernels.gated(both), down_kept, down)
            grads = kernels.gated_backward(both, grad_mid)
        else:
            (gate, up), grads = both.chunk(2, -1), torch.empty_like(both)
            active, (grad_gate, grad_up) = _active(gate), grads.chunk(2, -1)
            grad_mid, of_down = product_backward(above, active * up, down_kept, down)
            torch.mul(active, grad_mid, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_mid.mul_(up), gate, grad_input=grad_gate)
        grad_x, of_both = product_backward(grads, rows, both_kept, gate_and_up)
        return grad_x.view(ctx.shape), None, None, *of_both, *of_down
