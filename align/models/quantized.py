"""A trunk whose linear layers hold 4 or 8 bits a weight, by bitsandbytes; embeddings, norms and heads stay numbers.

4 bits are NF4 in blocks of 64 with double quantisation, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314). 8 bits
are the weights of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): an absolute maximum a row. Activations are not
rounded, as LLM.int8() does: there, what a token computes depends on the other tokens of its batch, so neither a packed
row nor a reference would be exact.

Shapes: n tokens, i and o a layer's input and output size.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
from accelerate.utils import is_bnb_available
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.recipe.errors import UserError

if is_bnb_available():
    import bitsandbytes

    LAYERS = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
else:
    LAYERS = ()

FORMATS = {"4bit": "NF4, blocks of 64, double quantisation", "8bit": "int8, an absolute maximum a row"}


def check_installed(quantize: str | None) -> None:
    """UserError where the recipe wants a quantised trunk and nothing here makes one."""
    if quantize and not LAYERS:
        raise UserError("model.quantize: bitsandbytes is not installed; run: pip install bitsandbytes")


def quantized_fingerprint(fingerprint: str, quantize: str | None) -> str:
    """Of a base in so many bits, from that of its weights: the numbers are others."""
    return sha256(f"{fingerprint} {FORMATS[quantize]}".encode()).hexdigest()[:16] if quantize else fingerprint


def loading(quantize: str, dtype: torch.dtype, device: torch.device, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantised model that computes in `dtype`; `model` is its skeleton.

    Four bits are stored as numbers of `dtype`, so that all parameters of a layer can be sharded as one.
    """
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    heads += [name for name, _ in model.named_modules() if name.endswith("pooler")]  # an encoder's may be new
    config = BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        llm_int8_skip_modules=heads,  # also those of four bits
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make the layers of a model that was just loaded compute alike in training and evaluation, on every device."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LAYERS):
            continue
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            model.set_submodule(name, _eight_bit_layer(layer))
        else:
            layer.quant_state = layer.weight.quant_state  # a shard of the weight has none
            layer.quant_state.dtype = dtype  # of the weights in a backward pass
            layer.support_avx512bf16_for_cpu = False  # which rounds anew where nothing trains, and for good


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has a layer whose weights are no numbers; or whether a layer is one."""
    return any(isinstance(layer, LAYERS) for layer in model.modules())


def numbers(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Its parameters that are floating-point numbers, by name. Four bits may be stored as if they were."""
    bits = {id(layer.weight) for layer in model.modules() if isinstance(layer, LAYERS)}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in bits:
            yield name, parameter


def ask_for_gradients(model: nn.Module, asked: bool) -> None:
    """Have its numbers learn, or nothing; bits never do."""
    model.requires_grad_(False)
    for _, parameter in numbers(model):
        parameter.requires_grad_(asked)


def like(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """A model that has taken over the layers of another: peft has to know that they are quantised."""
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, flag, getattr(other, flag, False))
    return model


@torch.no_grad()
def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain float32 layers of the values that its bits stand for, to be merged into and saved."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LAYERS):
            continue
        if isinstance(layer, EightBit):
            weight = _weights(layer.weight, layer.scale, torch.float32)  # (o, i)
        else:
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.quant_state).float()
        whole = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        if layer.source_cls is Conv1D:
            whole, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
        whole.weight = nn.Parameter(weight)
        if layer.bias is not None:
            whole.bias = nn.Parameter(layer.bias.float())
        model.set_submodule(name, whole)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model


def _eight_bit_layer(layer: nn.Linear) -> nn.Linear:
    """bitsandbytes' layer with a product of its own; peft knows it by its type."""
    out = EightBit(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, device=torch.device("meta")
    )
    scale = layer.weight.SCB.float() / 127  # (o,)
    out.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # (o, i) int8
    out.bias, out.source_cls = layer.bias, layer.source_cls
    out.register_buffer("scale", scale, persistent=False)
    return out


class EightBit(LAYERS[1] if LAYERS else nn.Linear):
    """y = W x + b with W from 8 bits a weight, made again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, i) -> (…, o), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _EightBitProduct.apply(x, self.weight, self.scale, bias)


class _EightBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        return nn.functional.linear(x, _weights(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream @ _weights(*ctx.saved_tensors, upstream.dtype), None, None, None


def _weights(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(o, i) numbers of (o, i) int8."""
    return weight.to(dtype).mul_(scale[:, None])
