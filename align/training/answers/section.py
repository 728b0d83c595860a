"""What a recipe says of answers that are drawn and measured while it trains."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from typing import Annotated

from pydantic import Field, model_validator

from align.recipe.schema import Source
from align.recipe.section import PositiveInt, Section
from align.recipe.train import Best, Train
from align.training.answers.measures import Measure
from align.training.rollouts.parts import RewardPart
from align.training.rollouts.rollout import Generation

PREFIX = "generate/"  # of the figures' names
OWN = ("response_tokens", "ended")  # figures of all answers


class Decoding(Generation):
    """How answers are drawn."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Logits are divided by it; at 0 the likeliest token is taken."""


class Generate(Section):
    """Answers to held-out prompts, drawn and measured at evaluations."""

    sources: list[Source] = Field(default_factory=list)
    """Where the prompts come from, in any format that has prompts. Default: the prompts of the eval rows."""
    max_rows: PositiveInt = 64
    """Answer at most this many prompts (seeded choice)."""
    every: PositiveInt = 1
    """Answer at every n-th evaluation, and always at the first and the last one."""
    samples: PositiveInt = 1
    """Answers to each prompt."""
    generation: Decoding = Field(default_factory=Decoding)
    """How they are drawn, from the same random numbers each time."""
    measures: list[Measure] = Field(default_factory=list)
    """Compare with the row's answer: `exact_match`, `contains`, `multiple_choice`, `rouge_l` (needs rouge-score),
    `math` (needs math-verify)."""
    scores: list[RewardPart] = Field(default_factory=list)
    """What scores an answer, by name: reward models on this trunk, other classifiers, functions. Scores are raw."""

    @model_validator(mode="after")
    def _fits_together(self) -> Generate:
        if any((part.weight, part.mean, part.std, part.clip) != (1.0, None, None, None) for part in self.scores):
            raise ValueError("`scores` are raw and not summed: leave `weight`, `mean`, `std` and `clip` out")
        if self.samples > 1 and self.generation.temperature == 0:
            raise ValueError("`samples`: at temperature 0 all answers to a prompt are alike; set `temperature`, or 1")
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"two figures are called {twice[0]}: give the score another `name`")
        return self

    @property
    def names(self) -> list[str]:
        """The figures, without their prefix."""
        return [*self.measures, *(part.title for part in self.scores), *OWN]


class AnsweringTrain(Train):
    """How long, and how often to look and to save."""

    generate: Generate | None = None
    """Answer held-out prompts at evaluations, and measure the answers. Default: none."""

    @model_validator(mode="after")
    def _best_is_measured(self) -> AnsweringTrain:
        check_metric(self.best, self.generate)
        return self


def check_metric(best: Best | None, generate: Generate | None) -> None:
    """ValueError where the best evaluation goes by a figure of answers that is not measured."""
    if best is None or not best.metric.startswith(PREFIX):
        return
    if generate is None:
        raise ValueError(f"`best.metric`: {best.metric} is a figure of answers: give `generate`")
    known = [PREFIX + name for name in generate.names]
    if best.metric not in known:
        close = get_close_matches(best.metric, known, 1)
        meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"`best.metric`: {best.metric!r} is not measured by `generate`; {meant}")
