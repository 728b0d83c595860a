"""How sure one can be of a mean over prompts: bootstrap intervals.

The unit of chance is the prompt: prompts are taken as a draw from many, a prompt's samples stay together. Every figure
is a `Statistic`: a function of how often each prompt was drawn. So all figures over the same prompts see the same
resamples, and what compares two runs is paired by construction.

Shapes: n prompts, s samples of each, r resamples. A sample that cannot be counted is nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

Statistic = Callable[[Array], Array]  # (r, n) how often each prompt was drawn -> (r,)

NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)
CHUNK = 512  # rows of weights at once, so that memory does not grow with the square of the prompts


class Draws(NamedTuple):
    """How often prompts are drawn again, and from which seed."""

    times: int
    seed: int


class Estimate(NamedTuple):
    """A figure with its 95 % interval; nan where it is not known."""

    value: float
    low: float
    high: float
    n: int  # prompts that count in it

    @property
    def turned(self) -> Estimate:
        """A share from the other side."""
        return Estimate(1 - self.value, 1 - self.high, 1 - self.low, self.n)


@lru_cache(maxsize=1)
def resamples(n: int, draws: Draws) -> Array:
    """(times, n) float64: how often each of n prompts is drawn when n are drawn with replacement."""
    times, seed = draws
    drawn = np.random.default_rng(seed).integers(n, size=(times, n)) + n * np.arange(times)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=times * n).reshape(times, n).astype(np.float64)
    counts.flags.writeable = False
    return counts


def estimate(statistic: Statistic, valid: Array, draws: Draws) -> Estimate:
    """The statistic of all prompts with its BCa interval (Efron 1987); `valid`: (n,) bool, prompts that count in it.

    BCa, because means of KL and of scores are skewed: it corrects the percentiles for bias and skewness, and is the
    percentile interval where there is neither. Its reach is widened for few prompts, as Student's t
    (arXiv 1411.5279). The negated statistic has exactly the negated interval.
    """
    (value,) = statistic(np.ones((1, len(valid))))
    n = int(valid.sum())
    if n < 2 or not math.isfinite(value):
        return Estimate(float(value), math.nan, math.nan, n)
    counts = resamples(len(valid), draws)
    drawn = np.concatenate([statistic(counts[i : i + CHUNK]) for i in range(0, draws.times, CHUNK)])
    kept = np.flatnonzero(valid)
    left_out = np.concatenate(
        [
            statistic(1.0 - (np.arange(len(valid)) == kept[i : i + CHUNK, None]).astype(np.float64))
            for i in range(0, n, CHUNK)
        ]
    )
    drawn, left_out = drawn[np.isfinite(drawn)], left_out[np.isfinite(left_out)]
    if len(drawn) < 0.9 * draws.times or len(left_out) < 2:  # too often without a value for its spread to be known
        return Estimate(float(value), math.nan, math.nan, n)
    return Estimate(float(value), *_bca(float(value), np.sort(drawn), left_out, _reach(n)), n)


def _bca(value: float, drawn: Array, left_out: Array, reach: float) -> tuple[float, float]:
    """The interval out of the sorted resampled values and the jackknife's."""
    tie = 1e-12 * max(1.0, abs(value))
    shift = (int((drawn < value - tie).sum()) - int((drawn > value + tie).sum())) / (2 * len(drawn))
    inside = min(abs(shift), 0.5 - 0.5 / len(drawn))
    bias = math.copysign(NORMAL.inv_cdf(0.5 + inside), shift) if shift else 0.0
    u = left_out.mean() - left_out
    spread = float((u * u).sum())
    skew = float((u**3).sum()) / (6 * spread**1.5) if spread > tie * tie else 0.0

    def rank(bias: float, skew: float) -> int:
        y = bias - reach
        share = NORMAL.cdf(bias + y / max(1 - skew * y, 0.1))
        return min(max(int(share * (len(drawn) + 1)), 1), len(drawn)) - 1

    return float(drawn[rank(bias, skew)]), float(drawn[len(drawn) - 1 - rank(-bias, -skew)])


def _reach(n: int) -> float:
    """Student's t for n values in place of 1.96, and sqrt(n / (n - 1)) for the bootstrap's narrow spread."""
    k = n - 1
    t = Z + (Z**3 + Z) / (4 * k) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * k * k)
    return t * math.sqrt(n / k)


def mean_of(x: Array) -> Statistic:
    """The weighted mean of (n,) values; a nan counts nowhere."""
    there = np.isfinite(x)
    filled = np.where(there, x, 0.0)

    def statistic(weights: Array) -> Array:
        return over(weights @ filled, weights @ there.astype(np.float64))

    return statistic


def mean(x: Array, draws: Draws) -> Estimate:
    """The mean of (n,) values, one a prompt, with its interval."""
    return estimate(mean_of(x), np.isfinite(x), draws)


def per_prompt(x: Array) -> Array:
    """(n, s) -> (n,): the mean of each prompt's samples, nan where none counts."""
    there = np.isfinite(x)
    return over(np.where(there, x, 0.0).sum(1), there.sum(1).astype(np.float64))


def over(numerator: Array, denominator: Array) -> Array:
    """Their quotient; nan where nothing is divided by."""
    known = denominator > 0
    return np.where(known, numerator / np.where(known, denominator, 1.0), np.nan)
