"""What a response is worth: a weighted sum of reward models and functions, each normalised and clipped.

Shapes: E episodes (responses), K parts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import islice
from numbers import Complex, Real
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from align.data.formats.prompts import Asked
from align.data.formats.turns import a
from align.models.judge import Judge, read_judge
from align.models.roles import CRITIC, Scorer, read_scorer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.functions import imported
from align.recipe.paths import Location
from align.recipe.schema import Section
from align.training.borders.foreign import foreign
from align.training.borders.processes import gathered
from align.training.borders.stops import Signals

LARGEST = torch.finfo(torch.float32).max
RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


class RewardPart(Section):
    """One part of the reward; it is one of `adapter`, `model` and `function`."""

    adapter: Location | None = None
    """`final/` folder of a run of align.reward on the same trunk: a role on it."""
    model: Location | None = None
    """Any other sequence-classification checkpoint, a folder or hub id, with its own tokenizer."""
    label: str | int | None = None
    """With `model`: the class whose log-odds are the score, by name or number; needed where it has several."""
    function: str | None = None
    """`package.module:function`, called as function(prompts, responses, rows); it returns a number a response."""
    name: Annotated[str | None, Field(pattern=r"^[\w-]+$")] = None
    """What the part is called in metrics. Default: `reward`, `model`, or the function's name."""
    weight: float = 1.0
    """Its weight in the sum. With 0 it is a judge, which is only watched."""
    mean: float | None = None
    """Taken off the score. Default: an adapter's mean on its demonstrations, else 0."""
    std: Annotated[float | None, Field(gt=0)] = None
    """What the score is then divided by. Default: an adapter's spread on its demonstrations, else 1."""
    clip: Annotated[float | None, Field(gt=0)] = None
    """The most that the result may be away from 0."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardPart:
        if sum(kind is not None for kind in (self.adapter, self.model, self.function)) != 1:
            raise ValueError("a part of the reward is one of `adapter`, `model` and `function`; give exactly one")
        if self.function is not None and not all(self.function.partition(":")):
            raise ValueError(f"`function`: expected package.module:function, found {self.function!r}")
        if self.label is not None and self.model is None:
            raise ValueError("`label` goes with `model`")
        if self.adapter is not None and self.name in ("default", CRITIC):
            raise ValueError(f"`name`: {self.name} is another role on the trunk")
        return self

    @property
    def title(self) -> str:
        """What it is called."""
        if self.name or self.function is None:
            return self.name or ("reward" if self.adapter else "model")
        return self.function.partition(":")[2]


class Answered(NamedTuple):
    """A response and what it answers, as texts; prompt + response is the text of all tokens decoded together."""

    asked: Asked
    prompt: str
    response: str


def stands_on(parts: Sequence[RewardPart], key: str) -> dict[str, Any]:
    """What a run's identity has of them: the folder of each model, by recipe key, and whether the rows are read."""
    named = [(f"{key}.{i}", part) for i, part in enumerate(parts)]
    models = {key: part.adapter or part.model for key, part in named if part.adapter or part.model}
    return {"results": models, "records": any(part.function for part in parts)}


class Rewards:
    """The parts of a recipe, loaded."""

    def __init__(self, parts: Sequence[RewardPart], trunk: Trunk, key: str = "ppo.rewards") -> None:
        """Raises UserError with every part that cannot be had."""
        self.parts = {part.title: part for part in parts}
        self.scorers: dict[str, Scorer] = {}
        self.judges: dict[str, Judge] = {}
        self.functions: dict[str, RewardFunction] = {}
        problems = []
        if len(self.parts) < len(parts):
            raise UserError(f"{key}: two parts have the same name; give each its `name`")
        for i, (title, part) in enumerate(self.parts.items()):
            try:
                if part.adapter:
                    found = read_scorer(part.adapter, f"{key}.{i}.adapter", trunk)
                    mean = found.mean if part.mean is None else part.mean
                    self.scorers[title] = found._replace(mean=mean, std=part.std or found.std)
                elif part.model:
                    self.judges[title] = read_judge(part.model, part.label, f"{key}.{i}", trunk.device, trunk.dtype)
                else:
                    self.functions[title] = imported(part.function, f"{key}.{i}.function", foreign)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)

    @property
    def leading(self) -> str | None:
        """The part that the critic starts as: the first on the trunk that counts."""
        return next((title for title in self.scorers if self.parts[title].weight), None)

    @property
    def read_texts(self) -> bool:
        """Whether some part reads texts instead of tokens."""
        return bool(self.judges or self.functions)

    def of_texts(self, answered: Sequence[Answered], rank: int, world: int, signals: Signals) -> dict[str, Tensor]:
        """Scores by the parts that read texts, (E,) float32 each; shared out over the processes, which all get all.

        Raises Stopped on a signal: at once, for nobody knows how long a function or another model takes.
        """
        mine = list(answered[rank::world])

        def own() -> dict[str, list[float]]:
            with signals.at_once():
                said = {title: judge(mine) for title, judge in self.judges.items()}
                named = self.functions.items()
                return said | {title: _called(function, self.parts[title].function, mine) for title, function in named}

        parts, found = gathered(own), {}
        for title in parts[0]:
            found[title] = torch.zeros(len(answered))
            for number, part in enumerate(parts):
                found[title][number::world] = torch.tensor(part[title], dtype=torch.float32)
        return found

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """Raw scores by part, (E,) each -> (E,), the weighted sum of what is normalised and clipped."""
        total = torch.zeros_like(next(iter(scores.values())))
        for title, part in self.parts.items():
            normal = self.scorers.get(title, part)  # it knows the part's mean and spread
            score = (scores[title] - (normal.mean or 0.0)) / (normal.std or 1.0)
            total += part.weight * (score if part.clip is None else score.clamp(-part.clip, part.clip))
        return total


def _called(function: RewardFunction, name: str, answered: list[Answered]) -> list[float]:
    if not answered:
        return []
    asked, prompts, responses = zip(*answered, strict=True)
    told = f"the reward function {name}"

    def called() -> list[float]:
        rows = copy.deepcopy([row.record for row in asked])  # its own, which it may change
        return _numbers(function(list(prompts), list(responses), rows), len(answered))

    scores = foreign(f"{told} failed", called)
    if len(scores) != len(answered):
        count = f"{len(scores)} scores" if len(scores) < len(answered) else f"more than {len(answered)} scores"
        raise UserError(f"{told} gave {count} for {len(answered)} responses")
    for score, response in zip(scores, responses, strict=True):
        if not abs(score) <= LARGEST:
            what = ", which is more than float32 holds," if math.isfinite(score) else ""
            raise UserError(f"{told} gave {score}{what} for the response {response[:200]!r}")
    return scores


def _numbers(given: Any, count: int) -> list[float]:
    """Scores in order, and one more than `count` of them where there are too many. Raises TypeError for what has no
    order or is text: a dict's keys and the letters of a text would pass for scores."""
    if isinstance(given, Mapping | Set | str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"it returned {a(given)}, not a list of numbers")
    scores = list(islice(given, count + 1))
    for score in scores:
        if isinstance(score, str | bytes) or (isinstance(score, Complex) and not isinstance(score, Real)):
            raise TypeError(f"it returned {a(score)} among its scores, which are to be real numbers")
    return [float(score) for score in scores]
