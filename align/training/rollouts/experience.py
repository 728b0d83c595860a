"""What PPO learns from: responses to prompts, and what every role and reward says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from align.data.examples import Examples
from align.models.roles import Entropy, Roles
from align.models.sampling.choice import Sampling
from align.training.loop import Loop
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import Episodes, Rollout, sampled, scored
from align.training.rollouts.watch import Watch


class Experience:
    """Sampled by the actor, read by all roles."""

    def __init__(self, roles: Roles, rewards: Rewards, watch: Watch, sampling: Sampling) -> None:
        self.roles, self.rewards, self.watch, self.sampling = roles, rewards, watch, sampling

    def sampled(
        self, loop: Loop, examples: Examples, chosen: np.ndarray, key: tuple[int, ...], samples: int
    ) -> Episodes:
        """Responses to the chosen prompts, (k,) int64, `samples` to each; raises Stopped on a signal."""
        loop.screen.phase("sampling")
        stems = [examples.tree(int(i)).segments[0] for i in chosen]
        keys = [(*key, place) for place in range(len(chosen))]
        heed = loop.session.signals.heed
        return sampled(loop.trunk, loop.batches, stems, keys, self.sampling, samples, heed)

    def scored(
        self,
        loop: Loop,
        examples: Examples,
        chosen: np.ndarray,
        episodes: Episodes,
        groups: Sequence[np.ndarray],
        to_learn: Entropy | None = None,
    ) -> tuple[Rollout, dict[str, Tensor]]:
        """The rollout, and every part of the reward by name, (E,) each; `groups` and `to_learn` as in `scored`.

        Raises Stopped on a signal."""
        loop.screen.phase("scoring")
        rollout = scored(self.roles, loop.batches, episodes, groups, [*self.rewards.scorers], loop.screen, to_learn)
        texts = self.watch.texts(examples, chosen, episodes) if self.rewards.read_texts else []
        signals = loop.session.signals
        parts = rollout.scores | self.rewards.of_texts(texts, loop.batches.rank, loop.batches.world, signals)
        loop.screen.phase("learning")
        return rollout, parts
