"""Answers to held-out prompts at a run's evaluations: drawn by what trains, measured, and kept to be looked at.

An answer depends on seed, prompt and its number among the samples, so two evaluations share their random numbers.

Shapes: n prompts, s samples of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.prompt_set import PromptSet
from align.models.roles import Scorers
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training.answers.measures import measured
from align.training.answers.section import PREFIX, Generate
from align.training.bootstrap import Draws, Estimate, mean, per_prompt
from align.training.meters import interval
from align.training.rollouts.parts import Answered
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import Episodes, check_samples, sampled, scored, texts

if TYPE_CHECKING:
    from align.training.loop import Loop

FILE = "answers.jsonl"
KEY = "train.generate.scores"
STREAM = 8  # tells this stream of random numbers apart
RESAMPLES = 2000
SHARES = ("exact_match", "contains", "multiple_choice", "math", "ended")  # of prompts, where each has one answer


class Answers:
    """The prompts of a run, and what measures its answers."""

    def __init__(self, section: Generate, prompts: PromptSet, trunk: Trunk, seed: int) -> None:
        """Scores on the trunk become frozen adapters of it. Raises UserError for what cannot be had."""
        self.section, self.prompts, self.trunk, self.seed = section, prompts, trunk, seed
        check_samples(trunk)
        own = next((part.title for part in section.scores if part.adapter), None)
        if own and (trunk.added or not trunk.adapted):
            key = "model.add_tokens" if trunk.adapted else "lora: null"
            raise UserError(
                f"{KEY}: {own} is an adapter on a frozen trunk, which `{key}` trains; give a `model` instead"
            )
        self.rewards = Rewards(section.scores, trunk, KEY)
        self.scorers = Scorers(trunk, self.rewards.scorers, seed)

    def due(self, loop: Loop) -> bool:
        """Whether the evaluation at hand has answers: a function of recipe and step."""
        every = loop.recipe.train.eval_every
        if not every or loop.step == loop.plan.steps or loop.step % every:
            return True
        return loop.step // every % self.section.every == 0

    def evaluated(self, loop: Loop) -> dict[str, float]:
        """Draw and measure; the figures, by name. Every process takes part and gets all. Raises Stopped on a signal."""
        loop.screen.phase("answering")
        section, prompts = self.section, self.prompts
        keys = [(self.seed, STREAM, key) for key in prompts.keys]
        how, heed = section.generation.sampling, loop.session.signals.heed
        episodes = sampled(self.trunk, loop.batches, prompts.stems, keys, how, section.samples, heed)
        said = iter(texts(self.trunk, episodes))
        answered = [Answered(row, *next(said)) for row in prompts.rows for _ in range(section.samples)]
        columns = self._columns(loop, episodes, answered)
        if loop.session.first:
            loop.run.append(FILE, *self._records(loop.step, episodes, answered, columns))
        loop.screen.phase("training")
        columns["response_tokens"] = episodes.said.double().numpy().reshape(-1, section.samples)
        columns["ended"] = episodes.ended.double().numpy().reshape(-1, section.samples)
        figures: dict[str, float] = {}
        for name, column in columns.items():
            found = estimated(per_prompt(column), self.seed, share=name in SHARES)
            figures[PREFIX + name] = found.value
            if np.isfinite(found.low):
                figures |= {f"{PREFIX}{name}_low": found.low, f"{PREFIX}{name}_high": found.high}
        for part in self.section.scores:
            if part.on_failure == "leave_out":
                figures[f"{PREFIX}failures/{part.title}"] = float(np.isnan(columns[part.title]).sum())
        return figures

    def _columns(self, loop: Loop, episodes: Episodes, answered: list[Answered]) -> dict[str, np.ndarray]:
        """(n, s) float64 each, in the recipe's order; nan where a score failed."""
        shape = len(self.prompts.stems), self.section.samples
        references = [reference for reference in self.prompts.references for _ in range(shape[1])]
        pairs = [*zip(answered, references, strict=True)]

        def beside_references() -> dict[str, list[float]]:
            return {
                name: [measured(name, answer.response, reference, answer.asked.record) for answer, reference in pairs]
                for name in self.section.measures
            }

        with loop.leaving_off():
            found = loop.session.decided(beside_references)  # a time limit may come earlier in another process
        every = [np.arange(len(episodes))]
        scores = scored(self.scorers, loop.batches, episodes, every, [*self.rewards.scorers], loop.screen)
        read = answered if self.rewards.read_texts else []
        with loop.leaving_off():
            scores |= self.rewards.of_texts(read, loop.batches.rank, loop.batches.world, loop.session.signals)
        for line in self.rewards.news():
            loop.session.say(line)
        found |= {name: scores[name].tolist() for name in self.rewards.parts}
        return {name: np.array(column, np.float64).reshape(shape) for name, column in found.items()}

    def _records(
        self, step: int, episodes: Episodes, answered: list[Answered], columns: dict[str, np.ndarray]
    ) -> list[dict[str, Any]]:
        """The lines of answers.jsonl."""
        samples = self.section.samples
        return [
            {
                "step": step,
                "prompt": answer.prompt,
                "sample": number % samples,
                "response": answer.response,
                "reference": self.prompts.references[number // samples],
                "tokens": len(response.tokens),
                "ended": bool(response.ended),
                "scores": {name: float(column.flat[number]) for name, column in columns.items()},
            }
            for number, (answer, response) in enumerate(zip(answered, episodes.flat, strict=True))
        ]


def estimated(each: np.ndarray, seed: int, share: bool) -> Estimate:
    """The mean of (n,) figures, one a prompt, with its 95 % interval over prompts: Wilson's of a share of prompts,
    where each is 0 or 1, else the bootstrap's. A nan counts nowhere; figures that are all equal have no interval."""
    there = each[np.isfinite(each)]
    if share and len(there) > 1 and np.isin(there, (0.0, 1.0)).all():
        return Estimate(float(there.mean()), *interval(float(there.sum()), len(there)), len(there))
    found = mean(each, Draws(RESAMPLES, seed))
    return found if np.ptp(there if len(there) else 0.0) else found._replace(low=np.nan, high=np.nan)
