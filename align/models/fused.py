"""Norms and gated MLPs in one autograd step each: the same numbers, fewer passes over memory, half of it kept.

The stock modules keep a float32 copy of every normalised input and four tensors of the MLP's width for the backward
pass; these keep the input, and gate and up, and compute the rest again. Which modules qualify is tried, not looked up:
a module that looks right is run both ways on random input, and is left alone unless value and gradient agree.

Shapes: n tokens, d hidden size, h the MLP's width, r a LoRA's rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.pytorch_utils import Conv1D

from align.models.lora import LoraLinear, Product, joined, parted, product, product_backward
from align.models.packed import Fixed, fixed, prepared
from align.models.rotary import fuse_rotary


def fuse(model: nn.Module) -> None:
    """Give every module that qualifies its fused forward."""
    fuse_rotary(model)
    verdicts: dict[tuple[type, type | None], bool] = {}
    for module in model.modules():
        _join(module, ("q_proj", "k_proj", "v_proj"))
        _join(module, ("gate_proj", "up_proj"))
        forward = _norm_forward if _is_norm(module) else _mlp_forward if _is_gated_mlp(module) else None
        if forward is None:
            continue
        kind = (type(module), type(getattr(module, "act_fn", None)))
        if kind not in verdicts:
            verdicts[kind] = _agrees(module, forward)
        if verdicts[kind]:
            module.forward = MethodType(forward, module)


def spare(last: nn.Module) -> None:
    """Give the last layer's MLP, where it is fused, only the positions whose states are read."""
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    if attention is None or mlp is None or "forward" not in vars(mlp):
        return
    whole, read = mlp.forward, None

    def forward(x: Tensor) -> Tensor:
        if read is None or len(read) == x.shape[1]:
            return whole(x)
        return torch.zeros_like(x).index_copy(1, read, whole(x.index_select(1, read)))

    def note(_attention: nn.Module, _args: tuple, given: dict) -> None:  # told again where the layer is recomputed
        nonlocal read
        read = given["forest"].read if "forest" in given else None

    mlp.forward = forward
    attention.register_forward_pre_hook(note, with_kwargs=True)


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
        self.given: Tensor | None = None
        self.ready: dict[LoraLinear, Tensor] = {}

    def products(self) -> list[Product] | None:
        """Of all layers; None if one of them cannot be joined now."""
        found = [layer.plain_product() for layer in self.layers]
        return None if any(p is None for p in found) else found

    def of(self, layer: LoraLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x; None if it has to be computed alone."""
        if self.given is not x or layer not in self.ready:
            self.given, self.ready = x, {}
            if self.fixed is not None and not torch.is_grad_enabled():
                outputs = self.fixed(x).split(self.sizes, -1)
            elif all(part.disable_adapters and not part.merged for part in self.layers):
                outputs = nn.functional.linear(x, self.weight, self.bias).split(self.sizes, -1)
            elif products := self.products():
                outputs = _JoinedProduct.apply(x, self, *(t for p in products for t in (p.a, p.b)))
            else:
                return None
            self.ready = dict(zip(self.layers, outputs, strict=True))
        out = self.ready.pop(layer)
        if not self.ready:
            self.given = None
        return out


@contextmanager
def fixed_products(model: nn.Module, rows: int) -> Iterator[None]:
    """While nothing trains: products with what acts now, joined and prepared once, for about so many rows."""
    ready = fix_products(model, rows)
    try:
        yield
    finally:
        for part in ready:
            part.fixed = None


@torch.no_grad()
def fix_products(model: nn.Module, rows: int) -> list[LoraLinear | Joined]:
    """The same for good; what was prepared."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    groups = {id(layer.group): layer.group for layer in layers if layer.group is not None}
    alone = [layer for layer in layers if layer.group is None]
    ready = [(part, found) for part in (*groups.values(), *alone) if (found := _fixed(part, rows))]
    for part, found in ready:
        part.fixed = found
    return [part for part, _ in ready]


def _fixed(part: LoraLinear | Joined, rows: int) -> Fixed | None:
    """None where a layer does not multiply plainly."""
    layers = part.layers if isinstance(part, Joined) else [part]
    if all(layer.disable_adapters and not layer.merged for layer in layers):
        base = part if isinstance(part, Joined) else part.get_base_layer()
        return None if isinstance(base, Conv1D) else Fixed(prepared(base.weight, base.bias, rows))
    if isinstance(part, Joined):
        parts = part.products()
        operands = joined(parts, part.weight, part.bias) if parts else None
    else:
        operands = part.plain_product()
    if operands is None:
        return None
    weight, bias, a, b, scale = operands
    return fixed(weight, bias, rows, a, b, scale)


def _join(module: nn.Module, names: tuple[str, ...]) -> None:
    layers = [getattr(module, name, None) for name in names]
    if not all(type(layer) is LoraLinear for layer in layers):
        return
    bases = [layer.get_base_layer() for layer in layers]
    like = {(b.weight.shape[1], b.weight.dtype, b.bias is None, type(b)) for b in bases}
    if len(like) == 1 and type(bases[0]) is nn.Linear:
        group = Joined(layers)
        for layer in layers:
            layer.group = group


class _JoinedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, *_trained):
        parts = group.products()
        operands = joined(parts, group.weight, group.bias)
        rows = x.reshape(-1, x.shape[-1])
        out, low = product(rows, operands)
        ctx.save_for_backward(rows, low, operands.a, operands.b)
        ctx.group, ctx.parts, ctx.shape = group, parts, x.shape
        return out.view(*x.shape[:-1], -1).split(group.sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        rows, low, a, b = ctx.saved_tensors
        above = torch.cat([part.reshape(len(rows), -1) for part in upstream], -1)
        operands = Product(ctx.group.weight, ctx.group.bias, a, b, 1.0)
        grad_x, grad_a, grad_b = product_backward(above, rows, low, operands)
        return grad_x.view(ctx.shape), None, *parted(grad_a, grad_b, ctx.parts)


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
        unit = x * scale  # float32
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (upstream.float() * unit).flatten(0, -2).sum(0).to(weight.dtype)
        slope = (upstream * weight).float()
        along = (slope * unit).mean(-1, keepdim=True)
        slope.sub_(unit.mul_(along)).mul_(scale)
        return slope.to(x.dtype), grad_weight, None


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    group, down = getattr(self.gate_proj, "group", None), self.down_proj.plain_product()
    parts = group.products() if group else None
    if parts is None or down is None or not torch.is_grad_enabled():
        return type(self).forward(self, x)
    trained = (t for p in (*parts, down) for t in (p.a, p.b))
    return _GatedMlp.apply(x, group, parts, down, *trained)


class _GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), each with its LoRA; gate and up as one product."""

    @staticmethod
    def forward(ctx, x, group, parts, down, *_trained):
        rows = x.reshape(-1, x.shape[-1])
        operands = joined(parts, group.weight, group.bias)
        both, low = product(rows, operands)  # (n, 2h): gate, up
        gate, up = both.chunk(2, -1)
        out, down_low = product(nn.functional.silu(gate).mul_(up), down)
        ctx.save_for_backward(rows, both, low, down_low, operands.a, operands.b, down.a, down.b)
        ctx.shape, ctx.group, ctx.parts, ctx.down = x.shape, group, parts, down
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, both, low, down_low, a, b, down_a, down_b = ctx.saved_tensors
        group, down = ctx.group, ctx.down._replace(a=down_a, b=down_b)
        above = upstream.reshape(-1, upstream.shape[-1])
        gate, up = both.chunk(2, -1)
        active = nn.functional.silu(gate)
        grad_mid, *grad_down = product_backward(above, active * up, down_low, down)
        grads = torch.empty_like(both)
        grad_gate, grad_up = grads.chunk(2, -1)
        torch.mul(active, grad_mid, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_mid.mul_(up), gate, grad_input=grad_gate)
        operands = Product(group.weight, group.bias, a, b, 1.0)
        grad_x, grad_a, grad_b = product_backward(grads, rows, low, operands)
        return grad_x.view(ctx.shape), None, None, None, *parted(grad_a, grad_b, ctx.parts), *grad_down
