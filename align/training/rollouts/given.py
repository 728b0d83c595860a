"""What a call of a reward function gives, read as scores.

Processes that functions have for themselves read with it too, so it imports neither torch nor what does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence, Set
from itertools import islice
from numbers import Complex, Real
from typing import Any

from align.data.formats.shown import a

LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32
SHOWN = 200  # characters of a response in a message

Verdict = float | str  # a response's score, or why there is none


def numbers(given: Any, count: int) -> list[float | None]:
    """Scores in order, and one more than `count` of them where there are too many. Raises TypeError for what has no
    order or is text: a dict's keys and the letters of a text would pass for scores."""
    if isinstance(given, Coroutine):
        given.close()  # else Python warns of it
        raise TypeError("it returned a coroutine, which nobody awaits; write the function as `async def`")
    if isinstance(given, Mapping | Set | str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"it returned {a(given)}, not a list of numbers")
    scores = list(islice(given, count + 1))
    for score in scores:
        several = isinstance(score, Collection) and not hasattr(score, "__float__")  # a tensor of one number has that
        if several or (isinstance(score, Complex) and not isinstance(score, Real)):
            raise TypeError(f"it returned {a(score)} among its scores, which are to be real numbers")
    return [None if score is None else float(score) for score in scores]


def verdicts(scores: Sequence[float | None], responses: Sequence[str]) -> list[Verdict]:
    """What one call says of each of its responses."""
    if len(scores) != len(responses):
        count = f"{len(scores)} scores" if len(scores) < len(responses) else f"more than {len(responses)} scores"
        return [f"gave {count} for {len(responses)} responses"] * len(responses)
    return [_verdict(score, response) for score, response in zip(scores, responses, strict=True)]


def _verdict(score: float | None, response: str) -> Verdict:
    of = f"for the response {response[:SHOWN]!r}"
    if score is None:
        return f"gave no score {of}; on_failure: leave_out goes on without such responses"
    if abs(score) <= LARGEST:
        return score
    return f"gave {score}{', which is more than float32 holds,' if math.isfinite(score) else ''} {of}"


def pause(attempt: int) -> float:
    """Seconds before the call number `attempt`, from 1, after one that failed: 0.5, doubled each time, at most 8."""
    return min(0.5 * 2.0 ** (attempt - 1), 8.0)


def late(timeout: float) -> str:
    """Why a call that took longer has no score."""
    return f"took longer than {timeout:g} s"
