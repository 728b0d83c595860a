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
        """Every part of the reward by name, (E,) each; `groups` as in `scored`. Raises Stopped on a signal, and
        UserError where a function fails, with the state before this step on disk."""
        loop.screen.phase("scoring")
        on_trunk = scored(self.roles, loop.batches, episodes, groups, [*self.rewards.scorers], loop.screen)
        texts = self.watch.texts(examples, chosen, episodes) if self.rewards.read_texts else []
        known_before = {*self.rewards.failed}
        with loop.leaving_off():
            read = self.rewards.of_texts(texts, loop.batches.rank, loop.batches.world, loop.session.signals)
        for title in self.rewards.failed.keys() - known_before:
            why = self.rewards.failed[title]
            loop.session.say(f"the reward function of {title} {why}; such responses are left out, and counted")
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
        return found

    def evaluated(self, loop: Loop, key: tuple[int, ...], kl_coef: float) -> dict[str, Any]:
        """Scores of responses to the held-out prompts, and how far the actor has gone."""
        examples, everyone = loop.data.eval, np.arange(len(loop.data.eval))
        episodes = self.sampled(loop, examples, everyone, key, self.section.eval_samples)
        parts = self.parts(loop, examples, everyone, episodes, [everyone])
        rollout, score = self.read(loop, episodes, [everyone]), self.score(parts, episodes)
        self.known(loop, score)
        found = self.figures(parts, score, episodes)
        found |= figures(rollout, kl_coef, found["score"])
        self.watch.evaluated(loop, episodes, score, found, self.section.kl_budget)
        of_prompts = score.view(len(everyone), -1).nanmean(1)  # they are independent
        low, high = mean_interval(of_prompts[~of_prompts.isnan()])
        return found | {"score_low": low, "score_high": high} if len(everyone) > 1 else found
