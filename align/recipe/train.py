"""How long a run is, how often it looks and saves, and which of its evaluations counts as the best."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.paths import Location
from align.recipe.section import PositiveInt, Section


class Best(Section):
    """Which evaluation is the best."""

    metric: Annotated[str, Field(min_length=1)]
    """A figure of the evaluations, as metrics.jsonl names it: `loss`, `accuracy`, `score`, `loss/<title>`,
    `generate/exact_match`."""
    goal: Literal["greatest", "least"]
    """Whether more of it is better, or less."""


class Train(Section):
    """How long, and how often to look and to save."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the mixture; fractions are allowed."""
    steps: PositiveInt | None = None
    """Stop after this many optimizer steps instead of `epochs`."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; there is always one before the first step and one after the last."""
    save_every: PositiveInt | None = 100
    """Steps between checkpoints; there is always one at the end, and one when the run is stopped."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    shard: Literal["none", "layers"] = "none"
    """With several processes: `layers` leaves a part of each weight on every process, and gathers a layer's while it
    computes, so that a trunk need not fit on one device. The numbers stay the same. A launcher's FSDP means this."""
    start_from: Location | None = None
    """Weights to train on: an earlier run's folder, one of its checkpoints, or its `final/` or `best/`, with the same
    trunk and the same `lora`. Steps, schedule and order are this run's own. Default: new weights."""
    best: Best | None = None
    """Keep the weights with the best evaluation in `best/`, which loads as `final/` does. The evaluation before the
    first step does not count. Default: only `final/` is kept."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a new best one. Default: never."""

    @model_validator(mode="after")
    def _patience_has_a_measure(self) -> Train:
        if self.patience and self.best is None:
            raise ValueError("`patience` needs `best`: {metric: loss, goal: least}, which says what it waits for")
        if self.patience and self.eval_every is None:
            raise ValueError("`patience` counts evaluations: give `eval_every`, else there is only one, at the end")
        return self
