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
from align.training.sources import titled, with_sources


class Hooks(NamedTuple):
    """What a stage adds; each is called on every process."""

    before: Callable[[Loop, Examples, np.ndarray], None] = lambda loop, examples, chosen: None
    """Before a step's or an evaluation's loss, with all its examples."""
    derive: Callable[[Sums], dict[str, Any]] = lambda sums: {}
    """What follows from the sums of a whole evaluation."""
    described: Callable[[Loop, bool], dict[str, Any]] = lambda loop, last: {}
    """What the align.json of a result holds besides; the second argument: whether it is after the last step."""
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
        self.labels = hooks.labels

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
        """Means over all held-out examples, whatever the batches; and over those of each titled source."""
        examples = loop.data.eval
        self.hooks.before(loop, examples, np.arange(len(examples)))
        found = {title: self._summed(loop, chosen) for title, chosen in titled(examples).items()}
        whole = Sums.of(found.values())
        figures = counted(whole) | self.hooks.derive(whole)
        by_source = {title: counted(sums) | self.hooks.derive(sums) for title, sums in found.items() if title}
        return with_sources(figures, by_source)

    def _summed(self, loop: Loop, chosen: np.ndarray) -> Sums:
        """The metrics of held-out examples, (k,) int64, over all processes."""
        examples, sums = loop.data.eval, Sums()
        with torch.no_grad():
            for row in loop.screen.track(loop.batches.rows(examples, chosen), "evaluating"):
                _, metrics = self.loss(loop.learner.model, loop.batches.plant(examples, row))
                for name, (value, count) in metrics.items() if row else ():
                    sums.add(name, value, count)
        return sums.merged(loop.accelerator)

    def may_be_best(self, figures: dict[str, Any]) -> bool:
        """Any weights may."""
        return True

    def described(self, loop: Loop, last: bool) -> dict[str, Any]:
        """What the stage says of them."""
        return self.hooks.described(loop, last)


def counted(sums: Sums) -> dict[str, float | list[float | None]]:
    """The means of what was there: a step may have no undesirable answer."""
    counts = sums.sums()
    return {name: mean for name, mean in sums.means().items() if name not in counts or counts[name][1]}
