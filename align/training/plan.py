"""What each optimizer step sees and how far it goes: pure functions of the recipe, so that a resumed run agrees."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from align.data.examples import Examples
from align.recipe.schema import BaseRecipe, Optim


class Plan:
    """The order of examples over all steps: epoch after epoch in one stream, cut into steps."""

    def __init__(self, recipe: BaseRecipe, examples: Examples) -> None:
        self.examples, self.seed, self.per_step = examples, recipe.seed, recipe.batch.examples
        self.epoch_size = len(examples.order(recipe.seed, 0))
        wanted = recipe.train.epochs * self.epoch_size
        self.total = recipe.train.steps * self.per_step if recipe.train.steps else max(1, round(wanted))
        self.steps = math.ceil(self.total / self.per_step)
        self._order = lru_cache(maxsize=2)(lambda epoch: examples.order(self.seed, epoch))

    def batch(self, step: int) -> np.ndarray:
        """The examples of step 1, 2, …, (at most `batch.examples`,) int64; only the last may have fewer."""
        assert 1 <= step <= self.steps, step
        first, last = (step - 1) * self.per_step, min(step * self.per_step, self.total)
        places = np.arange(first, last)
        epochs = places // self.epoch_size
        return np.concatenate(
            [self._order(int(e))[places[epochs == e] - e * self.epoch_size] for e in np.unique(epochs)]
        )

    def epoch(self, step: int) -> float:
        """Passes over the mixture when `step` is done."""
        return min(step * self.per_step, self.total) / self.epoch_size


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
