"""What PPO and GRPO share once advantages are known: passes over a step's responses, minibatch by minibatch.

Shapes: as in rollout.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.data.trees import Forest
from align.models.roles import Said
from align.training.learner import Loss, Work
from align.training.loop import Loop
from align.training.meters import Sums
from align.training.rollouts.rollout import Episodes, Rollout
from align.training.supervised import counted


class Targets:
    """What is learnt from, found for each batch by the numbers of its episodes."""

    def __init__(
        self, rollout: Rollout, device: torch.device, of_tokens: Sequence[Tensor], of_steps: Sequence[Tensor] = ()
    ) -> None:
        """`of_tokens`: grids (E, T); `of_steps`: grids (E, T + 1)."""
        masks = [rollout.tokens] * len(of_tokens) + [rollout.steps] * len(of_steps)
        self.grids = [
            (grid.to(device), mask.to(device)) for grid, mask in zip([*of_tokens, *of_steps], masks, strict=True)
        ]

    def of(self, batch: Forest) -> list[Tensor]:
        """Those of tokens, (n,) each, then those of steps, (S,) each."""
        episode = batch.targets.long()
        return [grid[episode][mask[episode]] for grid, mask in self.grids]


class Passes(NamedTuple):
    """What came of them."""

    sums: Sums  # metrics of the loss, over all optimizer steps
    norms: dict[str, float]  # of the last step's gradients
    updates: int  # optimizer steps

    @property
    def metrics(self) -> dict[str, Any]:
        """Means of the loss's metrics, norms, and how many optimizer steps there were."""
        means = {name: mean for name, mean in counted(self.sums).items() if name not in ("distinct", "moved", "loss")}
        return {**means, "updates": self.updates, **self.norms}

    @property
    def distinct(self) -> int:
        """Tokens that were trained on, over all processes and optimizer steps."""
        return int(self.sums.sums().get("distinct", (0.0, 0.0))[0])


def in_epochs(
    loop: Loop,
    chosen: np.ndarray,
    rate: float,
    rollout: Rollout,
    episodes: Episodes,
    epochs: Sequence[Sequence[np.ndarray]],
    loss_of: Callable[[np.ndarray, Said | None], Loss],
    beside: Callable[[int], list[Work]] = lambda number: [],
    stop_kl: float | None = None,
) -> Passes:
    """An optimizer step for each group of prompts of each epoch, (k,) int64.

    `loss_of(numbers, said)`: the loss of a minibatch's episodes, (e,) int64, already a share of its mean; `said`: what
    the roles say of it, where that is known. `beside(number)`: what else an optimizer step learns. They end early where
    KL(p_old, p) per token is more than `stop_kl`. `chosen`: examples that are named where a number is not finite.
    """
    sums, norms, updates = Sums(), {}, 0
    for number, group in enumerate(chain.from_iterable(epochs)):
        said = rollout.said if number == 0 else None  # at first nothing has changed since
        learning = loss_of(episodes.numbers(group), said)
        rows = [(episodes, row, learning) for row in loop.batches.rows(episodes, group)]
        found = loop.gradients([*beside(number), *rows])
        terms = found.sums()
        if number == 0:
            _check_unmoved(loop, terms)
        if stop_kl and updates and terms["update_kl"][0] > stop_kl * terms["update_kl"][1]:
            loop.learner.forget()
            break
        norms = loop.update(chosen, rate, terms["loss"][0], 1.0)
        updates += 1
        sums.include(found)
    return Passes(sums, norms, updates)


def _check_unmoved(loop: Loop, terms: dict[str, tuple[float, float]]) -> None:
    """Before a step's first update p / p_old is 1 and nothing is clipped, to the bit where rows are computed alike."""
    moved = terms["moved"][0] / terms["moved"][1]  # not a number: the update will tell the user
    exact = loop.trunk.device.type == "cpu"
    assert not moved > (0.0 if exact else 0.05), f"the actor differs by {moved} nats a token from the one that sampled"
    assert not exact or terms["clip_fraction"][0] == 0


def spent(started: float, sampled_at: float, scored_at: float, tokens: int) -> dict[str, float]:
    """Tokens of a step, and where its time went: it began, had sampled, and knew what to learn from at these times."""
    return {
        "sampled_tokens": tokens,
        "sample_seconds": sampled_at - started,
        "score_seconds": scored_at - sampled_at,
        "learn_seconds": time.perf_counter() - scored_at,
        "sampled_tokens_per_second": tokens / (sampled_at - started),
    }
