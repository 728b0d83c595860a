"""Adapters of earlier runs that stay beside frozen layers, for weights that cannot take them in.

A role's LoRA lies over the layer, so every role stands on base + kept adapters, and the bare trunk is just these.

Shapes: n tokens, i and o a layer's input and output size, r the sum of the kept adapters' ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models.quantized import is_quantized, numbers


class Kept(nn.Module):
    """B A x of all that is kept beside one layer. Buffers, for nothing here trains and nothing is saved again."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        """A (r, i); B (o, r), scaled."""
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o), in the dtype of the buffers."""
        return nn.functional.linear(nn.functional.linear(x.to(self.a.dtype), self.a), self.b)


@torch.no_grad()
def keep(layer: nn.Module, a: Tensor, b: Tensor) -> None:
    """Add B A x to what a layer computes from now on; A (r, i), and B (o, r) with its scale."""
    before = getattr(layer, "kept", None)
    if before is None:
        layer.kept = Kept(a, b)
        layer.register_forward_hook(_beside)
    else:
        layer.kept = Kept(torch.cat([before.a, a]), torch.cat([before.b, b], 1))


def _beside(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + layer.kept(args[0]).to(out.dtype)


def keeps(model: nn.Module) -> bool:
    """Whether an adapter stays beside some layer of a model."""
    return any(isinstance(module, Kept) for module in model.modules())


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold what is a number in `dtype`, buffers aside: rotary frequencies need their float32."""
    for _, parameter in numbers(model):
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Kept):
            module.to(dtype)


def folded(adapted: PeftModel, stays: Callable[[nn.Module], bool] = is_quantized) -> PreTrainedModel:
    """The model with its one adapter for good: kept beside each layer that `stays` as it is, merged into the others."""
    model = adapted.get_base_model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer) and stays(base := layer.get_base_layer()):
            (role,) = layer.lora_A
            a, b = layer.lora_A[role].weight.detach(), layer.lora_B[role].weight.detach()
            keep(base, a, b * layer.scaling[role])
            model.set_submodule(name, base)
    return adapted.merge_and_unload()
