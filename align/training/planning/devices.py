"""Devices by the names that people use: memory, speed, and how fast they reach each other.

Sizes are the vendors' (10^9 bytes). A device has a little less to give: the driver and its context take some.
"""

from __future__ import annotations

import os
import re
import time
from typing import NamedTuple

import torch

from align.models.base import compute_dtype
from align.models.memory import free_bytes
from align.recipe.errors import UserError
from align.training.costs import peak_flops

GB = 10**9
NETWORK = 25 * GB  # bytes/s between hosts and device: one 200 Gbit/s adapter a device, a usual cluster
LEAST = GB  # of a GPU
CONTEXT, WASTE = GB // 2, 0.04  # what a CUDA context takes, and the share that an allocator loses to gaps


class Device(NamedTuple):
    """One device of a run."""

    name: str
    type: str  # as torch names it
    memory: int  # bytes that a run can have; of a CPU those of all its processes, on all hosts
    dtype: torch.dtype  # that `model.dtype: auto` takes
    flops: float | None  # dense peak in `dtype`, per second; of a CPU with all its cores
    bandwidth: float | None  # of its memory, bytes/s
    link: float | None  # to a device of the same host, bytes/s in each direction
    kernels: bool = False  # C kernels compute on it
    source: str = ""


class _Card(NamedTuple):
    memory: int  # GB
    named: str  # as `torch.cuda.get_device_name` does, for its peak
    bandwidth: int  # GB/s
    link: float  # GB/s in each direction
    bfloat16: bool
    source: str


# Memory, its bandwidth and the links from NVIDIA's data sheets: nvidia.com/en-us/data-center/h200, …/h100, …/a100,
# …/l40s, …/tesla-t4, a10 (AWS names its variant A10G), geforce RTX 4090. NVLink counts both directions: halved here.
# Cards without it talk over PCIe: 4.0 x16 32 GB/s, 3.0 x16 16 GB/s in each direction.
CARDS = {
    "h200": _Card(141, "NVIDIA H200", 4800, 450, True, "NVIDIA H200 data sheet"),
    "h100": _Card(80, "NVIDIA H100 80GB HBM3", 3350, 450, True, "NVIDIA H100 data sheet, SXM"),
    "a100-80": _Card(80, "NVIDIA A100-SXM4-80GB", 2039, 300, True, "NVIDIA A100 80GB data sheet, SXM"),
    "a100-40": _Card(40, "NVIDIA A100-SXM4-40GB", 1555, 300, True, "NVIDIA A100 data sheet, SXM"),
    "l40s": _Card(48, "NVIDIA L40S", 864, 32, True, "NVIDIA L40S data sheet"),
    "rtx4090": _Card(24, "NVIDIA GeForce RTX 4090", 1008, 32, True, "NVIDIA Ada architecture white paper"),
    "a10g": _Card(24, "NVIDIA A10", 600, 32, True, "NVIDIA A10 data sheet"),
    "t4": _Card(16, "Tesla T4", 320, 16, False, "NVIDIA T4 data sheet"),
}


def device(name: str, hosts: int = 1) -> Device:
    """A device by name, or one of a size such as 24GB. UserError for what is neither.

    `cpu` is this machine, or so many like it: its free memory, and a speed that is measured in a moment.
    """
    name = name.lower().replace(" ", "")
    if name == "cpu":
        cpu = this_cpu()
        return cpu._replace(memory=cpu.memory * hosts)
    if card := CARDS.get(name):
        # A T4 multiplies no bfloat16, so a trunk is float32 there, as `compute_dtype` decides.
        dtype = torch.bfloat16 if card.bfloat16 else torch.float32
        return Device(
            name, "cuda", usable(card.memory * GB), dtype, peak_flops(card.named, dtype), card.bandwidth * GB,
            card.link * GB, source=card.source,
        )  # fmt: skip
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib)", name):
        memory = int(float(size[1]) * (GB if size[2] == "gb" else 2**30))
        if memory < LEAST:
            raise UserError(f"--device {name}: a GPU has {LEAST // GB} GB or more; its driver alone takes 0.5 GB")
        return Device(name, "cuda", usable(memory), torch.bfloat16, None, None, None)
    raise UserError(f"--device: there is no {name!r}; expected {', '.join(CARDS)}, cpu, or a size such as 24GB")


def usable(memory: int) -> int:
    """What a run can have of a GPU's memory."""
    return int((memory - CONTEXT) * (1 - WASTE))


def here() -> Device:
    """The device that a run on this machine takes, as it is now."""
    if torch.cuda.is_available():
        name, dtype = torch.cuda.get_device_name(), compute_dtype("auto", torch.device("cuda"))
        memory = int(free_bytes(torch.device("cuda")) * (1 - WASTE))
        known = next((card for card in CARDS.values() if card.named == name), None)
        bandwidth, link = (known.bandwidth * GB, known.link * GB) if known else (None, None)
        return Device(name, "cuda", memory, dtype, peak_flops(name, dtype), bandwidth, link)
    return _cpu(None)


def this_cpu() -> Device:
    """This machine's processor, with its speed measured: about a second."""
    return _cpu(_measured(compute_dtype("auto", torch.device("cpu"))))


def _cpu(flops: float | None) -> Device:
    place = torch.device("cpu")
    dtype = compute_dtype("auto", place)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    name = f"this CPU, {torch.get_num_threads()} threads"
    kernels = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return Device(name, "cpu", free_bytes(place) * processes, dtype, flops, None, None, kernels, "measured")


def _measured(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a square product, the best of some."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
