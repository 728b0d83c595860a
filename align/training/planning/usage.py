"""Memory that a run takes in fact: what it may have before it begins, and the most that it held."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from align.training.costs import peak_memory
from align.training.planning.devices import Device, here

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Usage:
    """Of this process on its device. On a CPU what was there before the model is loaded, libraries above all, does not
    count."""

    def __init__(self) -> None:
        self.device: Device | None = None  # with the memory that the run may have
        self.before = 0

    def begin(self) -> None:
        """Before the first weight is loaded."""
        self.device = here()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):  # the kernel's high-water mark begins again; only Linux has it
            RESET.write_text("5")
        self.before = psutil.Process().memory_info().rss

    @property
    def peak(self) -> int | None:
        """Most bytes so far, beyond what was there before; None if nothing has begun."""
        if self.device is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(0, _most_resident() - self.before)


def _most_resident() -> int:
    if sys.platform == "linux":
        with suppress(OSError, ValueError, StopIteration):
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return 1024 * int(line.split()[1])
    return peak_memory(torch.device("cpu"))
