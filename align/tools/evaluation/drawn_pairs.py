"""Preferences out of a policy's own responses: pairs of them, each with a winner drawn from a score.

Of a prompt's samples the first two are a pair, the next two another, so no response stands in two pairs. The winner is
drawn under Bradley and Terry's law (1952), P(a beats b) = sigmoid(s(a) - s(b)): like a labeller who errs where two are
close. What comes out are on-policy pairs for `align.reward` and `align.dpo`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from align.data.formats.prompts import Asked
from align.recipe.errors import UserError
from align.recipe.records import to_json
from align.recipe.schema import Section
from align.tools.evaluation.generation import Responses
from align.tools.evaluation.measures import ratio
from align.training.bootstrap import Draws, Estimate

PAIRING = 7  # tells this stream of random numbers from others of the same seed
REASONS = ("equal", "cut off", "empty", "without a score")  # why a pair is left out


class Preferences(Section):
    """Pairs of responses, written as preferences.jsonl."""

    score: str
    """Which of `evaluate.scores` draws the winners: P(a beats b) = sigmoid(score of a - score of b)."""


class DrawnPairs(NamedTuple):
    """Pairs of n prompts."""

    rows: list[dict[str, Any]]  # in the `pairs` format
    counts: np.ndarray  # (n,) float64, pairs of each prompt
    as_scored: np.ndarray  # (n,) float64, those whose winner has the higher score; a tie counts one half
    left_out: dict[str, int]  # by REASONS

    def lines(self) -> str:
        """preferences.jsonl."""
        return "".join(to_json(row) + "\n" for row in self.rows)

    def accuracy(self, draws: Draws) -> Estimate:
        """Of the score itself on these pairs: the most that a reward model can be expected to reach."""
        return ratio(self.as_scored, self.counts, draws) if self.rows else Estimate(math.nan, math.nan, math.nan, 0)


def check_conversations(rows: Sequence[Asked]) -> None:
    """Raise UserError unless all prompts are conversations, as the `pairs` format has them."""
    if texts := sum(row.messages is None for row in rows):
        raise UserError(
            f"evaluate.preferences: {texts:,} of {len(rows):,} prompts are beginnings of texts, but a pair answers a "
            "conversation; give prompts as conversations"
        )


def drawn_pairs(rows: Sequence[Asked], keys: Sequence[str], responses: Responses, score: str, seed: int) -> DrawnPairs:
    """`rows` and `keys`: (n,), of the prompts. A pair's winner depends on seed, prompt and the pair's number alone."""
    scores, ended = responses.scores[score], responses.figures["ended"]  # (n, s)
    n, samples = scores.shape
    written: list[dict[str, Any]] = []
    counts, as_scored, left_out = np.zeros(n), np.zeros(n), dict.fromkeys(REASONS, 0)
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        lots = np.random.default_rng([seed, PAIRING, int(key, 16)]).random(samples // 2)
        for k, lot in enumerate(lots):
            pair = slice(2 * k, 2 * k + 2)
            first, second = (one.response for one in responses.answered[i * samples :][pair])
            if why := _unfit(first, second, ended[i, pair], scores[i, pair]):
                left_out[why] += 1
                continue
            margin = scores[i, 2 * k] - scores[i, 2 * k + 1]
            wins = lot < 0.5 + 0.5 * math.tanh(margin / 2)  # the sigmoid
            counts[i] += 1
            as_scored[i] += 0.5 if margin == 0 else wins == (margin > 0)
            chosen, rejected = (first, second) if wins else (second, first)
            tools = {"tools": row.record["tools"]} if row.record.get("tools") else {}
            written.append({"messages": row.messages, **tools, "chosen": chosen, "rejected": rejected})
    return DrawnPairs(written, counts, as_scored, left_out)


def _unfit(first: str, second: str, ended: np.ndarray, scores: np.ndarray) -> str | None:
    """Why two responses are no pair. One that was cut off would be taught with an end that it does not have."""
    if not np.isfinite(scores).all():
        return "without a score"
    if not ended.all():
        return "cut off"
    if not (first.strip() and second.strip()):
        return "empty"
    return "equal" if first.strip() == second.strip() else None
