"""Numbers, defined once: what a run measures, with the formula of each.

Metrics are kept as sums and counts and divided once, so they do not depend on batch size or on the number of
processes. An unknown number is `None` and printed as `–`, never guessed.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn


def perplexity(sum_nll: float, tokens: float) -> float:
    """exp(sum of negative log-likelihoods in nats / labelled tokens); nan without tokens."""
    if tokens == 0:
        return math.nan
    try:
        return math.exp(sum_nll / tokens)
    except OverflowError:
        return math.inf


class Sums:
    """Metrics as sums and counts, divided once: neither the order nor the size of batches matters."""

    def __init__(self) -> None:
        self._terms: dict[str, list[tuple[float | Tensor, float | Tensor]]] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor = 1) -> None:
        """Add a sum over `count` items. 0-d tensors stay on their device until read: no wait here.

        A vector of sums (and of counts, or one count for all) is kept entry by entry: a histogram.
        """
        if isinstance(total, Tensor) and total.ndim:
            counts = count if isinstance(count, Tensor) and count.ndim else [count] * len(total)
            for i, (part, n) in enumerate(zip(total, counts, strict=True)):
                self.add(f"{name}[{i:03}]", part, n)
            return
        self._terms.setdefault(name, []).append((_detached(total), _detached(count)))

    def include(self, other: Sums) -> None:
        """Add all that another has counted."""
        for name, terms in other._terms.items():
            self._terms.setdefault(name, []).extend(terms)

    @classmethod
    def of(cls, parts: Iterable[Sums]) -> Sums:
        """All that the parts have counted."""
        whole = cls()
        for part in parts:
            whole.include(part)
        return whole

    def sums(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum, count), each rounded once (`math.fsum`), so in any order the same to the last bit."""
        return {
            name: (
                math.fsum(float(total) for total, _ in terms),
                math.fsum(float(count) for _, count in terms),
            )
            for name, terms in self._terms.items()
        }

    def means(self) -> dict[str, float | list[float | None]]:
        """Name -> sum / count; nan where nothing was counted. Of a vector a list, with None there."""
        means: dict[str, float | list[float | None]] = {}
        for name, (total, count) in self.sums().items():
            bare, bracket, _ = name.partition("[")
            if bracket:
                means.setdefault(bare, []).append(total / count if count else None)
            else:
                means[name] = total / count if count else math.nan
        return means

    def merged(self, accelerator: Accelerator) -> Sums:
        """The sums over all processes: one all-reduce of a float64 vector. Every process must call it.

        A process that saw no batch knows no names, so the names are agreed first.
        """
        own = self.sums()
        names = sorted(set(gather_object(list(own))))
        flat = [number for name in names for number in own.get(name, (0.0, 0.0))]
        vector = torch.tensor(flat, dtype=torch.float64, device=accelerator.device)
        whole = accelerator.reduce(vector, "sum").tolist()
        merged = Sums()
        for name, total, count in zip(names, whole[::2], whole[1::2], strict=True):
            merged.add(name, total, count)
        return merged


def _detached(number: float | Tensor) -> float | Tensor:
    return number.detach() if isinstance(number, Tensor) else number


def buckets(values: Tensor, edges: Sequence[float]) -> Tensor:
    """values (m,) -> (m, len(edges) + 1) float32, 1 in the bin of each: below edges[0], …, above the last."""
    bins = torch.bucketize(values, torch.tensor(edges, device=values.device), right=True)
    return nn.functional.one_hot(bins, len(edges) + 1).float()


def wins(better: Tensor, worse: Tensor) -> Tensor:
    """(m,) and (m,) -> (m,) float32: 1 where the better scores higher, 0.5 where they are equal, else 0."""
    return ((better > worse).float() + (better >= worse).float()) / 2


def interval(successes: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not trials:
        return math.nan, math.nan
    z, p = 1.959964, successes / trials
    middle, reach = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    low, high = (middle - reach) / (1 + z * z / trials), (middle + reach) / (1 + z * z / trials)
    return max(low, 0.0), min(high, 1.0)  # beyond them by rounding alone


def mean_interval(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) independent values, n > 1: 1.96 standard errors to either side."""
    reach = 1.959964 * float(values.double().std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()) - reach, float(values.mean()) + reach


@dataclass
class Throughput:
    """Work over wall-clock time. Each distinct token counts once: no padding, no repeats of a sampler."""

    devices: int = 1
    tokens: int = 0
    examples: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, examples: int, seconds: float) -> None:
        """Add one step; tokens and examples are over all devices."""
        self.tokens += tokens
        self.examples += examples
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """TGS: tokens per second per device; nan before any time has passed."""
        return self.tokens / (self.seconds * self.devices) if self.seconds else math.nan

    @property
    def examples_per_second(self) -> float:
        """Examples per second per device; nan before any time has passed."""
        return self.examples / (self.seconds * self.devices) if self.seconds else math.nan


SPREAD_STEPS, SPIKE_WINDOW, SPIKE_SIGMAS = 100, 128, 6


class Stability(NamedTuple):
    """How steadily the training loss fell."""

    spread: float | None  # standard deviation of the losses of the first 100 steps; None with fewer than two
    spikes: list[int] | None  # steps with a loss above mean + 6 sigma of the 128 before; None if never so many


def loss_stability(steps: Sequence[int], losses: Sequence[float]) -> Stability:
    """Stability of the logged losses, in step order: a function of metrics.jsonl, in no checkpoint."""
    steps_n, losses_n = np.asarray(steps), np.asarray(losses, dtype=np.float64)
    first = losses_n[steps_n <= SPREAD_STEPS]
    spread = float(first.std()) if len(first) > 1 else None
    if len(losses_n) <= SPIKE_WINDOW:
        return Stability(spread, None)
    before = np.lib.stride_tricks.sliding_window_view(losses_n, SPIKE_WINDOW)[:-1]  # (n - 128, 128)
    limit = before.mean(axis=1) + SPIKE_SIGMAS * before.std(axis=1)
    return Stability(spread, steps_n[SPIKE_WINDOW:][losses_n[SPIKE_WINDOW:] > limit].tolist())


def environment() -> dict[str, Any]:
    """What the run ran on, for environment.json: no host name, user name or path."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {
            name: _version(name) for name in ("align", "torch", "transformers", "peft", "accelerate", "trl", "datasets")
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        or [f"CPU ({torch.backends.cpu.get_cpu_capability()})"],
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False)
        if cuda
        else torch.cpu._is_avx512_bf16_supported(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
    }


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
