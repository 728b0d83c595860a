"""What a stage puts into the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from align.training.loop import Learnt, Loop


class Algorithm(Protocol):
    """What a stage puts into the loop; each is called on every process."""

    labels: list[str] | None  # what the outputs of a head are, in words

    def learn(self, loop: Loop, chosen: np.ndarray, rate: float) -> Learnt:
        """One step on the chosen examples, (k,) int64, at a learning rate. Once it has changed a weight it must not
        raise Stopped."""

    def evaluate(self, loop: Loop) -> dict[str, Any]:
        """Figures of the held-out examples."""

    def may_be_best(self, figures: dict[str, Any]) -> bool:
        """Whether weights with these figures of an evaluation may be kept as the best."""

    def described(self, loop: Loop, last: bool) -> dict[str, Any]:
        """What the align.json of a result of the weights as they are holds besides; `last`: after the last step."""
