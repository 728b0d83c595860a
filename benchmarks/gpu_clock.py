"""How much the parts of `gpu.py` do, and how they are timed.

Clocks are read when the device has done its work, after a first time that is not counted: it compiles. Peaks are those
of the counted work, with all that is held meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator

from align.training.costs import peak_memory

WARM_STEPS, ENOUGH_SECONDS = 3, 10  # steps at least that are not counted; no further round after so long


class Scale(NamedTuple):
    """How much there is to do."""

    steps: int = 8  # that are counted, in whole rounds over all rows
    conversations: int = 64
    texts: int = 16  # of 4,096 tokens
    pairs: int = 64
    prompts: tuple[int, ...] = (16, 64)  # sampled from at once; PPO takes the first number
    samples: int = 4
    new: int = 128  # tokens of every response: it cannot end before
    updates: int = 2  # of PPO that are counted


class Row(NamedTuple):
    """One measurement."""

    part: str
    what: str
    rate: float
    unit: str  # a second
    peak_bytes: int
    more: dict[str, float]


def second_time(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and peak bytes of the second of two runs."""
    for _ in range(2):
        forget_peak(device)
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - begun
    return seconds, peak_memory(device)


def process(device: torch.device) -> Accelerator:
    """This process alone."""
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no")


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: torch.device) -> None:
    """Peak memory counts from here; not so on a CPU, where it is the process's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
