"""What is seen of a PPO run beside its metrics: responses over time, the best actor so far, and warnings in words."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.examples import Examples
from align.data.prompts import Asked, asked
from align.training.diagnosis import diagnose
from align.training.loop import Loop
from align.training.rewards import Answered, Rewards
from align.training.rollout import Episodes

KEPT = 8  # held-out prompts whose responses are kept, evaluation after evaluation
FILE = "episodes.jsonl"


class Watch:
    """Reads what was sampled, and keeps what a user wants to see of it."""

    def __init__(self, rewards: Rewards, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rewards, self.tokenizer = rewards, tokenizer
        self._rows: dict[int, list[Asked]] = {}  # of each side
        self._said: set[str] = set()

    def texts(self, examples: Examples, chosen: np.ndarray, episodes: Episodes) -> list[Answered]:
        """Every episode, (E,), as text with the row that its prompt came from."""
        rows = self._rows.setdefault(id(examples), [])
        if not rows:
            rows += asked(examples)
        return [
            Answered(rows[int(i)], self._text(prompt), self._text(response.tokens))
            for i, prompt, responses in zip(chosen, episodes.prompts, episodes.responses, strict=True)
            for response in responses
        ]

    def evaluated(
        self, loop: Loop, episodes: Episodes, score: Tensor, figures: dict[str, float], budget: float | None
    ) -> None:
        """Note some responses; put the actor in `best/` if it is; warn."""
        best = loop.memory.get("best")
        within = budget is None or figures["kl"] <= budget
        if loop.step and within and (best is None or figures["score"] > best["score"]):
            best = {"step": loop.step, "score": figures["score"], "kl": figures["kl"]}
            loop.memory["best"] = best
            loop.publish(loop.run.folder / "best", best)
        if not loop.session.first:
            return
        for i in range(min(KEPT, len(episodes))):
            number = i * episodes.samples
            loop.run.append(
                FILE,
                {
                    "step": loop.step,
                    "prompt": self._text(episodes.prompts[i]),
                    "response": self._text(episodes.flat[number].tokens),
                    "score": float(score[number]),
                },
            )
        judges = [name for name, part in self.rewards.parts.items() if not part.weight]
        history = [*loop.run.records("metrics.jsonl"), {"step": loop.step, "split": "eval", **figures}]
        for finding in diagnose(history, judges):
            if finding.kind not in self._said:
                self._said.add(finding.kind)
                loop.session.say(f"warning, step {loop.step}: {finding.text}")

    def _text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def check_unmoved(loop: Loop, terms: dict[str, tuple[float, float]]) -> None:
    """Before a step's first update p / p_old is 1 and nothing is clipped, to the bit where rows are computed alike."""
    moved = terms["moved"][0] / terms["moved"][1]  # not a number: the update will tell the user
    exact = loop.trunk.device.type == "cpu" and not loop.recipe.model.compile
    assert not moved > (0.0 if exact else 0.05), f"the actor differs by {moved} nats a token from the one that sampled"
    assert not exact or terms["clip_fraction"][0] == 0
