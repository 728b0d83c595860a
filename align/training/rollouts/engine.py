"""What draws a run's responses: its own sampling engine, or an inference server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from align.data.mixture import Prepared
from align.models.sampling.choice import Sampling
from align.models.trunk import Trunk
from align.recipe.engine import Server
from align.training.loop import Loop
from align.training.rollouts.rollout import Episodes, Generation, Rollout, sampled
from align.training.rollouts.served import Served
from align.training.session import Session


class Drawing(Generation):
    """How responses are drawn, and by what."""

    engine: Literal["own"] | Server = "own"
    """`own` samples on the run's trunk. A section with the `url` of a server: docs/rollouts.md."""

    @property
    def sampling(self) -> Sampling:
        """The same for a sampling engine."""
        return Sampling(**{**self.model_dump(exclude={"engine"}), "stop": tuple(self.stop)})


class Engine(Protocol):
    """Draws responses of the actor as it is; each is called on every process."""

    def sampled(
        self, loop: Loop, prompts: Sequence[np.ndarray], keys: Sequence[tuple[int, ...]], samples: int
    ) -> Episodes:
        """`samples` responses to each prompt, (l,) int32, with its key; raises Stopped on a signal."""

    def weighed(self, loop: Loop, rollout: Rollout) -> Rollout:
        """With the weight of each token in the policy loss."""


class Own:
    """The sampling engine on the run's trunk: a response depends on its prompt and key alone."""

    def __init__(self, how: Sampling) -> None:
        self.how = how

    def sampled(
        self, loop: Loop, prompts: Sequence[np.ndarray], keys: Sequence[tuple[int, ...]], samples: int
    ) -> Episodes:
        """See `Engine`."""
        return sampled(loop.trunk, loop.batches, prompts, keys, self.how, samples, loop.session.signals.heed)

    def weighed(self, loop: Loop, rollout: Rollout) -> Rollout:
        """As it is: every token counts 1."""
        return rollout


def engine_of(session: Session, trunk: Trunk, data: Prepared, generation: Drawing, key: str) -> Engine:
    """The recipe's engine for the prompts of `data`; `key`: what it is called in the recipe.

    Raises UserError for a server that is not there or has another trunk.
    """
    if generation.engine == "own":
        return Own(generation.sampling)
    return Served(session, trunk, data, generation.engine, generation.sampling, key)
