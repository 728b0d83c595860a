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
        return self.engine.weighed(loop, found)

    def evaluated(self, loop: Loop, key: tuple[int, ...], kl_coef: float) -> dict[str, Any]:
        """Scores of responses to the held-out prompts, and how far the actor has gone."""
        examples, everyone = loop.data.eval, np.arange(len(loop.data.eval))
        episodes = self.sampled(loop, examples, everyone, key, self.section.eval_samples)
        parts = self.parts(loop, examples, everyone, episodes, [everyone])
        rollout, score = self.read(loop, episodes, [everyone]), self.score(parts, episodes)
        found = score_figures(parts, score, episodes)
        found |= figures(rollout, kl_coef, found["score"])
        self.watch.evaluated(loop, episodes, score, found, self.section.kl_budget)
        low, high = mean_interval(score.view(len(everyone), -1).mean(1))  # over prompts, which are independent
        return found | {"score_low": low, "score_high": high} if len(everyone) > 1 else found
