"""What each optimizer step sees and how far it goes: pure functions of the recipe, so that a resumed run agrees."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from align.data.examples import Examples
from align.recipe.schema import BaseRecipe, Optim


class Plan:
    """The order of examples over all steps: epoch after epoch in one stream, cut into steps.

    It begins after `step` steps that took the stream's first `place` examples: only after a run that was extended is
    `place` anything but their product, for its last step may have taken fewer.
    """

    def __init__(self, recipe: BaseRecipe, examples: Examples, step: int = 0, place: int = 0) -> None:
        self.examples, self.seed, self.per_step = examples, recipe.seed, recipe.batch.examples
        self.epoch_size = len(examples.order(recipe.seed, 0))
        self.begun, self.at = step, place
        if recipe.train.steps:
            self.total = place + (recipe.train.steps - step) * self.per_step
        else:
            self.total = max(1, round(recipe.train.epochs * self.epoch_size))
        self.steps = step + math.ceil((self.total - place) / self.per_step)
        self._order = lru_cache(maxsize=2)(lambda epoch: examples.order(self.seed, epoch))

    def batch(self, step: int) -> np.ndarray:
        """The examples of the next steps, (at most `batch.examples`,) int64; only the last may have fewer."""
        assert self.begun < step <= self.steps, step
        places = np.arange(self.place(step - 1), self.place(step))
        epochs = places // self.epoch_size
        return np.concatenate(
            [self._order(int(e))[places[epochs == e] - e * self.epoch_size] for e in np.unique(epochs)]
        )

    def place(self, step: int) -> int:
        """Examples of the stream that were taken when `step` is done."""
        return min(self.at + (step - self.begun) * self.per_step, self.total)

    def epoch(self, step: int) -> float:
        """Passes over the mixture when `step` is done."""
        return self.place(step) / self.epoch_size

    @property
    def shape(self) -> str:
        """How many steps there are, of how many examples, in words."""
        ahead = self.steps > self.begun
        first = self.place(self.begun + 1) - self.at if ahead else self.per_step
        last = self.place(self.steps) - self.place(self.steps - 1) if ahead else first
        said = f"{self.steps:,} step{'s' * (self.steps != 1)} of {first:,} example{'s' * (first != 1)}"
        if last < first:
            said += f" (the last of {last:,})"
        if first > self.epoch_size:
            times = f"{first / self.epoch_size:,.1f}".removesuffix(".0")
            said += f": each of the {self.epoch_size:,} of an epoch {times} times a step"
        return said


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step 1 … `steps`: linear warm-up, then `schedule` down to min_ratio at the last step's end."""
    warmup = round(optim.warmup * steps) if optim.warmup < 1 else int(optim.warmup)
    if step <= warmup:
        return optim.learning_rate * step / (warmup + 1)
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    fall = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.min_ratio + (1 - optim.min_ratio) * fall)


def row_budget(wanted: int | str, device: torch.device) -> int:
    """`auto`: as many tokens as keep the device busy; more only costs memory."""
    if wanted != "auto":
        return int(wanted)
    return 16_384 if device.type == "cuda" else 2_048
