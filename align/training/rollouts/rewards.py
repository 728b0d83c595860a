"""What a response is worth: a weighted sum of reward models and functions, each normalised and clipped.

Shapes: E episodes (responses), K parts. A response to which a part gave no score has nan there, and in the sum where
the part counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.models.judge import Judge, read_judge
from align.models.roles import Scorer, read_scorer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training.borders.processes import gathered
from align.training.borders.stops import Signals
from align.training.rollouts.functions import Function, called, imported
from align.training.rollouts.parts import Answered, RewardPart


def stands_on(parts: Sequence[RewardPart], key: str) -> dict[str, Any]:
    """What a run's identity has of them: the folder of each model, by recipe key, and whether the rows are read."""
    named = [(f"{key}.{i}", part) for i, part in enumerate(parts)]
    models = {key: part.adapter or part.model for key, part in named if part.adapter or part.model}
    return {"results": models, "records": any(part.function for part in parts)}


class Said(NamedTuple):
    """What one process's share got."""

    scores: dict[str, list[float]]
    failed: dict[str, str]  # why functions gave no score
    problems: tuple[str, ...]  # of a UserError


class Rewards:
    """The parts of a recipe, loaded."""

    def __init__(self, parts: Sequence[RewardPart], trunk: Trunk, key: str = "ppo.rewards") -> None:
        """Raises UserError with every part that cannot be had."""
        self.parts = {part.title: part for part in parts}
        self.scorers: dict[str, Scorer] = {}
        self.judges: dict[str, Judge] = {}
        self.functions: dict[str, Function] = {}
        self.failed: dict[str, str] = {}  # why functions gave no score, the last reason of each
        self._told: set[str] = set()  # of which a user has been told
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
                    self.functions[title] = imported(part, f"{key}.{i}")
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

        Raises Stopped on a signal: at once, for nobody knows how long a function or another model takes. Where one
        process raises UserError, all do.
        """
        mine = list(answered[rank::world])

        def own() -> Said:
            try:
                with signals.at_once():
                    said = {title: judge(mine) for title, judge in self.judges.items()} | called(self.functions, mine)
            except UserError as error:
                return Said({}, {}, error.problems)
            return Said(said, {title: of.failed for title, of in self.functions.items() if of.failed}, ())

        parts = gathered(own)
        if problems := next((part.problems for part in parts if part.problems), None):
            raise UserError(*problems)
        found = {title: torch.zeros(len(answered)) for title in parts[0].scores}
        for number, part in enumerate(parts):
            self.failed |= part.failed
            for title, scores in part.scores.items():
                found[title][number::world] = torch.tensor(scores, dtype=torch.float32)
        return found

    def news(self) -> list[str]:
        """A line for each function that has left a response out for the first time."""
        new = [title for title in self.failed if title not in self._told]
        self._told.update(new)
        return [
            f"the reward function of {title} {self.failed[title]}; such responses are left out, and counted"
            for title in new
        ]

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """Raw scores by part, (E,) each -> (E,), the weighted sum of what is normalised and clipped.

        nan where a part that counts has none and may leave responses out. Raises UserError for any other nan.
        """
        total = torch.zeros_like(next(iter(scores.values())))
        for title, part in self.parts.items():
            if not part.weight:  # a judge: where it has no score, the sum still is one
                continue
            if part.on_failure == "stop" and scores[title].isnan().any():
                raise UserError(f"the reward {title} gave a score that is not a number; check its weights")
            normal = self.scorers.get(title, part)  # it knows the part's mean and spread
            score = (scores[title] - (normal.mean or 0.0)) / (normal.std or 1.0)
            total += part.weight * (score if part.clip is None else score.clamp(-part.clip, part.clip))
        return total

    def failures(self, scores: dict[str, Tensor]) -> dict[str, int]:
        """How many responses have no score of parts that may leave some out; scores (E,) each."""
        leaving = [title for title, part in self.parts.items() if part.on_failure == "leave_out"]
        return {f"failures/{title}": int(scores[title].isnan().sum()) for title in leaving}

    def check_known(self, known: Tensor) -> None:
        """Raise UserError where no response has a score, (…) bool: then nothing can be learnt or said."""
        if not known.any():
            why = "; ".join(f"{self.parts[title].function} {why}" for title, why in self.failed.items())
            raise UserError(f"no response got a score: the reward function {why}")
