"""What PPO and GRPO learn from: responses to prompts, what they are worth, and what every role says of them.

Shapes: as in rollout.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.models.roles import Entropy, Roles
from align.training.loop import Loop
from align.training.meters import mean_interval
from align.training.rollouts.engine import engine_of
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import Episodes, Rollout, figures, read, score_figures, scored
from align.training.rollouts.sections import Rewarded
from align.training.rollouts.watch import Watch
from align.training.session import Session
from align.training.sources import titled, with_sources


class FromRewards:
    """What PPO and GRPO put into the loop alike."""

    labels = None
    experience: Experience

    def may_be_best(self, figures: dict[str, Any]) -> bool:
        """Whether the actor is within its budget."""
        return self.experience.section.affords(figures["kl"])

    def described(self, loop: Loop, last: bool) -> dict[str, Any]:
        """What the result's align.json tells besides."""
        return {}


class Experience:
    """Sampled by the actor, judged by the rewards, read by the roles."""

    def __init__(
        self, session: Session, data: Prepared, roles: Roles, rewards: Rewards, section: Rewarded, name: str
    ) -> None:
        """`name`: the stage's `section`. Raises UserError where its engine cannot be had."""
        self.roles, self.rewards, self.section = roles, rewards, section
        self.watch = Watch(rewards, roles.trunk)
        self.engine = engine_of(session, roles.trunk, data, section.generation, f"{name}.generation.engine")

    def sampled(
        self, loop: Loop, examples: Examples, chosen: np.ndarray, key: tuple[int, ...], samples: int
    ) -> Episodes:
        """Responses to the chosen prompts, (k,) int64, `samples` to each; raises Stopped on a signal."""
        loop.screen.phase("sampling")
        stems = [examples.tree(int(i)).segments[0] for i in chosen]
        keys = [(*key, place) for place in range(len(chosen))]
        return self.engine.sampled(loop, stems, keys, samples)

    def parts(
        self, loop: Loop, examples: Examples, chosen: np.ndarray, episodes: Episodes, groups: Sequence[np.ndarray]
    ) -> dict[str, Tensor]:
        """Every part of the reward by name, (E,) each; `groups` as in `scored`. Raises Stopped on a signal, and
        UserError where a function fails, with the state before this step on disk."""
        loop.screen.phase("scoring")
        on_trunk = scored(self.roles, loop.batches, episodes, groups, [*self.rewards.scorers], loop.screen)
        texts = self.watch.texts(examples, chosen, episodes) if self.rewards.read_texts else []
        with loop.leaving_off():
            read = self.rewards.of_texts(texts, loop.batches.rank, loop.batches.world, loop.session.signals)
        for line in self.rewards.news():
            loop.session.say(line)
        return on_trunk | read

    def score(self, parts: dict[str, Tensor], episodes: Episodes) -> Tensor:
        """(E,): the sum of the parts less the penalties; nan for responses that are left out."""
        return self.rewards.total(parts) - self.section.penalty(episodes.said, episodes.ended)

    def known(self, loop: Loop, score: Tensor) -> Tensor:
        """Which responses of a step have a score, like `score` bool. Raises UserError where none has one, with the
        state before this step on disk."""
        known = ~score.isnan()
        with loop.leaving_off():
            self.rewards.check_known(known)
        return known

    def figures(self, parts: dict[str, Tensor], score: Tensor, episodes: Episodes) -> dict[str, float | None]:
        """Means of scores and lengths, and how many scores there are not; `parts` and `score` (E,) each."""
        return score_figures(parts, score, episodes) | self.rewards.failures(parts)

    def read(
        self,
        loop: Loop,
        episodes: Episodes,
        groups: Sequence[np.ndarray],
        to_learn: Entropy | None = None,
        reference: bool = True,
    ) -> Rollout:
        """What the roles say of all episodes; see `rollout.read`."""
        loop.screen.phase("scoring")
        found = read(self.roles, loop.batches, episodes, groups, loop.screen, to_learn, reference)
        loop.screen.phase("learning")
        return self.engine.weighed(loop, found)

    def evaluated(self, loop: Loop, key: tuple[int, ...], kl_coef: float) -> dict[str, Any]:
        """Scores of responses to the held-out prompts, and how far the actor has gone."""
        examples, everyone = loop.data.eval, np.arange(len(loop.data.eval))
        episodes = self.sampled(loop, examples, everyone, key, self.section.eval_samples)
        parts = self.parts(loop, examples, everyone, episodes, [everyone])
        rollout, score = self.read(loop, episodes, [everyone]), self.score(parts, episodes)
        self.known(loop, score)
        found = self.figures(parts, score, episodes)
        found |= figures(rollout, kl_coef, found["score"]) | _interval(score, episodes, everyone)
        self.watch.evaluated(loop, episodes, score, found)
        by_source = {
            title: _of_source(rollout, score, episodes, chosen) for title, chosen in titled(examples).items() if title
        }
        return with_sources(found, by_source)


def _interval(score: Tensor, episodes: Episodes, chosen: np.ndarray) -> dict[str, float]:
    """That of the mean score (E,) over prompts, (k,) int64, which are independent; nothing for fewer than
    two with a score."""
    of_prompts = score[episodes.numbers(chosen)].view(len(chosen), -1).nanmean(1)  # nan where no response has a score
    known = of_prompts[~of_prompts.isnan()]
    if len(known) < 2:
        return {}
    low, high = mean_interval(known)
    return {"score_low": low, "score_high": high}


def _of_source(rollout: Rollout, score: Tensor, episodes: Episodes, chosen: np.ndarray) -> dict[str, float | None]:
    """Means over the responses to some prompts, (k,) int64; None where none of them has a score."""
    numbers = episodes.numbers(chosen)
    kl, known = (rollout.logprobs - rollout.ref_logprobs)[numbers].sum(1), ~score[numbers].isnan()
    return {
        "score": float(score[numbers][known].mean()) if known.any() else None,
        **_interval(score, episodes, chosen),
        "kl": float(kl.mean()),
        "response_tokens": float(episodes.said[numbers].double().mean()),
        "ended": float(episodes.ended[numbers].double().mean()),
    }
