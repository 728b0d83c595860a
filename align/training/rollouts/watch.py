"""What is seen of a run that samples, beside its metrics: responses over time, and warnings in words."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from align.data.examples import Examples
from align.data.formats.prompts import Asked, asked
from align.models.trunk import Trunk
from align.training.loop import Loop
from align.training.rollouts.diagnosis import RECENT, diagnose
from align.training.rollouts.parts import Answered
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import Episodes, texts

KEPT = 8  # held-out prompts whose responses are kept, evaluation after evaluation
FILE = "episodes.jsonl"


class Watch:
    """Reads what was sampled, and keeps what a user wants to see of it."""

    def __init__(self, rewards: Rewards, trunk: Trunk) -> None:
        self.rewards, self.trunk = rewards, trunk
        self._rows: dict[int, list[Asked]] = {}  # of each side
        self._courses: dict[str, list[dict[str, Any]]] | None = None  # metrics of each split
        self._said: set[str] = set()

    def texts(self, examples: Examples, chosen: np.ndarray, episodes: Episodes) -> list[Answered]:
        """Every episode, (E,), as text with the row that its prompt came from."""
        rows = self._rows.setdefault(id(examples), [])
        if not rows:
            rows += asked(examples)
        asked_of = (rows[int(i)] for i, own in zip(chosen, episodes.responses, strict=True) for _ in own)
        return [Answered(row, *text) for row, text in zip(asked_of, texts(self.trunk, episodes), strict=True)]

    def evaluated(self, loop: Loop, episodes: Episodes, score: Tensor, figures: dict[str, float]) -> None:
        """Note some responses; warn."""
        if not loop.session.first:
            return
        few = Episodes(episodes.prompts[:KEPT], [own[:1] for own in episodes.responses[:KEPT]])
        for (prompt, response), first in zip(texts(self.trunk, few), episodes.firsts, strict=False):
            of = {"prompt": prompt, "response": response, "score": float(score[first])}
            loop.run.append(FILE, {"step": loop.step, **of})
        self._warn(loop, loop.step, "eval", figures)

    def learnt(self, loop: Loop, step: int, metrics: dict[str, Any]) -> None:
        """Warn of what a step's metrics show, where there are held-out rows and where there are none."""
        if loop.session.first:
            self._warn(loop, step, "train", metrics)

    def _warn(self, loop: Loop, step: int, split: str, metrics: dict[str, Any]) -> None:
        if self._courses is None:  # a resumed run judges by its whole course
            self._courses = {"train": [], "eval": []}
            for record in loop.run.records("metrics.jsonl"):
                self._courses[record["split"]].append(record)
        course = self._courses[split]
        course.append(metrics)
        del course[1 : -4 * RECENT]  # judged by the first record and by the last ones
        judges = [name for name, part in self.rewards.parts.items() if not part.weight]
        for finding in diagnose(self._courses["train"], self._courses["eval"], judges):
            if finding.kind not in self._said:
                self._said.add(finding.kind)
                loop.session.say(f"warning, step {step}: {finding.text}")
