"""PPO-ptx: language modelling beside PPO, against forgetting what was learnt before (Ouyang et al. 2022)."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.formats.reading import Reading
from align.data.templates.render import conversations
from align.data.trees import Forest
from align.recipe.schema import Data, Eval, PositiveInt, Section, Source
from align.training.learner import Metrics, Work
from align.training.loop import Loop


class Ptx(Section):
    """Language modelling in every optimizer step of PPO."""

    sources: list[Source] = Field(min_length=1)
    """Conversations or texts."""
    examples: PositiveInt = 16
    """Of them in an optimizer step, over all processes."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of their mean negative log-likelihood per token, beside the policy loss."""
    max_length: PositiveInt = 1024
    """Most tokens in one of them; longer ones are cut."""

    def reading(self, run: Data) -> tuple[Reading, Data]:
        """How they are read, where the rest of the `data` section is the run's."""
        changes = {
            "train": self.sources, "eval": Eval(), "max_length": self.max_length, "overlong": "truncate"
        }  # fmt: skip
        return conversations("assistant"), run.model_copy(update=changes)


class Pretraining:
    """The examples and their loss."""

    def __init__(self, section: Ptx, examples: Examples, seed: int) -> None:
        self.section, self.examples = section, examples
        self.order = lru_cache(maxsize=2)(lambda epoch: examples.order(seed, epoch))

    def work(self, loop: Loop, place: int) -> list[Work]:
        """This process's rows for the optimizer step at a place in the run, 0 …"""
        epoch_size, count = len(self.order(0)), self.section.examples
        places = range(place * count, (place + 1) * count)
        chosen = np.array([self.order(i // epoch_size)[i % epoch_size] for i in places])
        tokens = max(int(self.examples.labels[chosen].sum()), 1)

        def loss(roles: nn.Module, batch: Forest) -> tuple[Tensor, Metrics]:
            logprobs = roles(batch, valued=False).logprobs
            total = -self.section.weight * logprobs.sum() / tokens
            return total, {"loss": (total, 0), "loss/ptx": (-logprobs.sum(), len(logprobs))}

        return [(self.examples, row, loss) for row in loop.batches.rows(self.examples, chosen)]
