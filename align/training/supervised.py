"""Learning from examples that say what is right: the step and the evaluation of every stage but PPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.models.trunk import Trunk
from align.training.learner import Loss
from align.training.loop import Learnt, Loop
from align.training.meters import Sums
from align.training.runs.run import Run
from align.training.session import Session


class Hooks(NamedTuple):
    """What a stage adds; each is called on every process."""

    before: Callable[[Loop, Examples, np.ndarray], None] = lambda loop, examples, chosen: None
    """Before a step's or an evaluation's loss, with all its examples."""
    derive: Callable[[Sums], dict[str, Any]] = lambda sums: {}
    """What follows from the sums of a whole evaluation."""
    conclude: Callable[[Loop], dict[str, Any]] = lambda loop: {}
    """After the last step; what it returns stands in the result's align.json."""
    labels: list[str] | None = None
    """What the outputs of a head are."""


def fit(session: Session, run: Run, trunk: Trunk, data: Prepared, loss: Loss, **hooks: Any) -> None:
    """Train on the data to the end of the plan, or to a signal; leave `final/` and `report.html`.

    `loss(trunk, batch)` gives a sum and metrics; `hooks`: those of `Hooks`.
    """
    Loop(session, run, trunk, data, Supervised(loss, Hooks(**hooks))).run_all()


class Supervised:
    """One optimizer step a batch; the mean of every metric over the held-out examples."""

    def __init__(self, loss: Loss, hooks: Hooks) -> None:
        self.loss, self.hooks = loss, hooks
        self.conclude, self.labels = hooks.conclude, hooks.labels

    def learn(self, loop: Loop, chosen: np.ndarray, rate: float) -> Learnt:
        """One optimizer step."""
        examples = loop.data.train
        self.hooks.before(loop, examples, chosen)
        sums = loop.gradients([(examples, row, self.loss) for row in loop.batches.rows(examples, chosen)])
        means, (distinct, _) = counted(sums), sums.sums()["distinct"]
        del means["distinct"]
        norms = loop.update(chosen, rate, means["loss"], sums.sums()["loss"][1])
        metrics = {**means, "learning_rate": rate, **norms}
        return Learnt(metrics, int(distinct), int(examples.lengths[chosen].sum()))

    def evaluate(self, loop: Loop) -> dict[str, Any]:
        """Means over all held-out examples, whatever the batches."""
        examples, everyone = loop.data.eval, np.arange(len(loop.data.eval))
        sums = Sums()
        self.hooks.before(loop, examples, everyone)
        with torch.no_grad():
            for row in loop.screen.track(loop.batches.rows(examples, everyone), "evaluating"):
                _, metrics = self.loss(loop.learner.model, loop.batches.plant(examples, row))
                for name, (value, count) in metrics.items() if row else ():
                    sums.add(name, value, count)
        merged = sums.merged(loop.accelerator)
        return counted(merged) | self.hooks.derive(merged)


def counted(sums: Sums) -> dict[str, float | list[float | None]]:
    """The means of what was there: a step may have no undesirable answer."""
    counts = sums.sums()
    return {name: mean for name, mean in sums.means().items() if name not in counts or counts[name][1]}
