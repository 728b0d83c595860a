"""What a run costs: its FLOPs, its share of a device's peak, its memory.

An unknown number is `None`, never guessed.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from align.models.trunk import Trunk
from align.training.meters import Throughput


def costs(trunk: Trunk, meter: Throughput, lengths: np.ndarray) -> dict[str, Any]:
    """What a run cost, for summary.json; `lengths` are its examples' tokens."""
    name = torch.cuda.get_device_name() if trunk.device.type == "cuda" else "CPU"
    config = trunk.plain.config.get_text_config()
    flops = flops_per_token(config, matmul_params(trunk.plain), causal_attended(lengths.tolist()), lora=trunk.adapted)
    speed = meter.tokens_per_second
    return {
        "tokens_per_second": speed if meter.seconds else None,
        "model_flops_per_token": flops,
        "mfu": mfu(speed, flops, peak_flops(name, trunk.dtype)) if meter.seconds else None,
        "peak_memory_bytes": peak_memory(trunk.device),
    }


def matmul_params(model: nn.Module) -> int:
    """N: weights that a token is multiplied with, of the trunk alone.

    Looked-up embeddings are not counted (a tied output head is, once), nor vectors, nor LoRA adapters.
    """
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or ".lora_" in f".{name}":
            continue
        if isinstance(module, nn.Linear):  # by shape, because a 4-bit weight packs two numbers into one
            total += module.in_features * module.out_features
        else:
            total += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
    return total


def causal_attended(lengths: Iterable[int]) -> float:
    """Mean positions that a token attends to, itself included, over causal sequences of these lengths."""
    lengths = list(lengths)
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def flops_per_token(
    config: Any, n_params: int, attended: float, *, lora: bool, gradient_checkpointing: bool = False
) -> float:
    """Floating-point operations to train on one token.

    Matrix products, after Kaplan et al. (2020, arXiv 2001.08361): 2N forward, 2N backward for activations and
    2N backward for weights, which LoRA leaves out: 6N full, 4N LoRA (its own small products not counted).
    Attention, after Chowdhery et al. (2022, arXiv 2204.02311, appendix B), but over the positions attended
    to: a layer's two products cost 4 · heads · head_dim · attended forward and twice that backward (both of
    their operands are activations, so LoRA saves nothing): 12 · layers · heads · head_dim · attended.

    Args:
        config: transformers' config of the decoder (`num_hidden_layers`, `num_attention_heads`, …).
        n_params: N, from `matmul_params`.
        attended: mean positions attended to per token, for example from `causal_attended`.
        lora: whether the trunk's weights are frozen.
        gradient_checkpointing: count the second forward pass too, the hardware's work, for HFU. MFU counts
            the model's work and leaves it off.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    forward = 2 * n_params + 4 * config.num_hidden_layers * heads * head_dim * attended
    backward_for_activations = 2 * n_params + 8 * config.num_hidden_layers * heads * head_dim * attended
    backward_for_weights = 0 if lora else 2 * n_params
    return forward * (2 if gradient_checkpointing else 1) + backward_for_activations + backward_for_weights


# Dense peaks in TFLOP/s, (bfloat16, float16, float32 without TF32), from the vendors' datasheets and white
# papers: halved where these count 2:4 sparsity, with float32 accumulation where they give both.
# Whole names only: a MIG slice, a laptop part, a "D" or a "Ti" is another device.
_PEAKS: dict[str, tuple[float | None, float | None, float | None]] = {
    r"Tesla V100-SXM2-\d+GB": (None, 125, 15.7),
    r"Tesla V100-PCIE-\d+GB": (None, 112, 14),
    r"Tesla T4": (None, 65, 8.1),
    r"NVIDIA A10": (125, 125, 31.2),
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": (312, 312, 19.5),
    r"NVIDIA L4": (121, 121, 30.3),
    r"NVIDIA L40S": (362.05, 362.05, 91.6),
    r"NVIDIA H100 80GB HBM3": (989.4, 989.4, 66.9),
    r"NVIDIA H100 PCIe": (756, 756, 51),
    r"NVIDIA H100 NVL": (835.5, 835.5, 60),
    r"NVIDIA H200": (989.4, 989.4, 66.9),
    r"NVIDIA B200": (2250, 2250, 75),
    r"NVIDIA GeForce RTX 3090": (71, 71, 35.6),
    r"NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6),
    r"NVIDIA GeForce RTX 5090": (209.5, 209.5, 104.8),
    r"AMD Instinct MI300X": (1307.4, 1307.4, 163.4),
}


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of a device, named as by `torch.cuda.get_device_name`; None if unknown.

    float32 is None where PyTorch may compute it in TF32: its peak is then another one.
    """
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}.get(dtype)
    if column is None or (dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None
    for pattern, peaks in _PEAKS.items():
        if re.fullmatch(pattern, device):
            peak = peaks[column]
            return None if peak is None else peak * 1e12
    return None


def mfu(tokens_per_second: float, flops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation (arXiv 2204.02311): TGS x FLOPs per token / dense peak; None if unknown."""
    return None if peak is None else tokens_per_second * flops / peak


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
