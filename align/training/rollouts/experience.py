"""What PPO and GRPO learn from: responses to prompts, what they are worth, and what every role says of them.

Shapes: as in rollout.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from align.data.examples import Examples
from align.models.roles import Entropy, Roles
from align.training.loop import Loop
from align.training.meters import mean_interval
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import Episodes, Rollout, figures, read, sampled, score_figures, scored
from align.training.rollouts.sections import Rewarded
from align.training.rollouts.watch import Watch
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

    def __init__(self, roles: Roles, rewards: Rewards, watch: Watch, section: Rewarded) -> None:
        self.roles, self.rewards, self.watch, self.section = roles, rewards, watch, section

    def sampled(
        self, loop: Loop, examples: Examples, chosen: np.ndarray, key: tuple[int, ...], samples: int
    ) -> Episodes:
        """Responses to the chosen prompts, (k,) int64, `samples` to each; raises Stopped on a signal."""
        loop.screen.phase("sampling")
        stems = [examples.tree(int(i)).segments[0] for i in chosen]
        keys = [(*key, place) for place in range(len(chosen))]
        how, heed = self.section.generation.sampling, loop.session.signals.heed
        return sampled(loop.trunk, loop.batches, stems, keys, how, samples, heed)

    def parts(
        self, loop: Loop, examples: Examples, chosen: np.ndarray, episodes: Episodes, groups: Sequence[np.ndarray]
    ) -> dict[str, Tensor]:
        """Every part of the reward by name, (E,) each; `groups` as in `scored`. Raises Stopped on a signal."""
        loop.screen.phase("scoring")
        on_trunk = scored(self.roles, loop.batches, episodes, groups, [*self.rewards.scorers], loop.screen)
        texts = self.watch.texts(examples, chosen, episodes) if self.rewards.read_texts else []
        signals = loop.session.signals
        return on_trunk | self.rewards.of_texts(texts, loop.batches.rank, loop.batches.world, signals)

    def score(self, parts: dict[str, Tensor], episodes: Episodes) -> Tensor:
        """(E,): the sum of the parts less the penalties."""
        return self.rewards.total(parts) - self.section.penalty(episodes.said, episodes.ended)

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
        return found

    def evaluated(self, loop: Loop, key: tuple[int, ...], kl_coef: float) -> dict[str, Any]:
        """Scores of responses to the held-out prompts, and how far the actor has gone."""
        examples, everyone = loop.data.eval, np.arange(len(loop.data.eval))
        episodes = self.sampled(loop, examples, everyone, key, self.section.eval_samples)
        parts = self.parts(loop, examples, everyone, episodes, [everyone])
        rollout, score = self.read(loop, episodes, [everyone]), self.score(parts, episodes)
        found = score_figures(parts, score, episodes)
        found |= figures(rollout, kl_coef, found["score"]) | _interval(score, episodes, everyone)
        self.watch.evaluated(loop, episodes, score, found)
        by_source = {
            title: _of_source(rollout, score, episodes, chosen) for title, chosen in titled(examples).items() if title
        }
        return with_sources(found, by_source)


def _interval(score: Tensor, episodes: Episodes, chosen: np.ndarray) -> dict[str, float]:
    """That of the mean score (E,) over prompts, (k,) int64, which are independent; nothing for one prompt."""
    if len(chosen) < 2:
        return {}
    low, high = mean_interval(score[episodes.numbers(chosen)].view(len(chosen), -1).mean(1))
    return {"score_low": low, "score_high": high}


def _of_source(rollout: Rollout, score: Tensor, episodes: Episodes, chosen: np.ndarray) -> dict[str, float]:
    """Means over the responses to some prompts, (k,) int64."""
    numbers = episodes.numbers(chosen)
    kl = (rollout.logprobs - rollout.ref_logprobs)[numbers].sum(1)
    return {
        "score": float(score[numbers].mean()),
        **_interval(score, episodes, chosen),
        "kl": float(kl.mean()),
        "response_tokens": float(episodes.said[numbers].double().mean()),
        "ended": float(episodes.ended[numbers].double().mean()),
    }
