"""What compares runs over the same prompts: win rates, best-of-n, over-optimisation laws; with bootstrap intervals.

Shapes: n prompts, s samples of one run and t of another, r resamples. A sample that cannot be counted is nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from align.training.bootstrap import Draws, Estimate, Statistic, Z, estimate, mean, over, per_prompt

# ---------------------------------------------------------------------------------------------------- win rates


class Duel(NamedTuple):
    """Two runs over the same prompts. All is a margin in [-1, 1], wins minus losses: win rate = (1 + margin) / 2."""

    margin: Estimate
    equal_length: Estimate  # the margin that a regression expects of answers of equal length
    p: float  # two-sided, of the margin being 0


def duel(a: Array, b: Array, length_a: Array, length_b: Array, draws: Draws) -> Duel:
    """Head to head: scores and lengths of run a (n, s) and of run b (n, t). Swapped, every figure is negated, exactly.

    Per prompt: the mean over all pairs of samples of sign(a - b), a tie 0. At equal length: the intercept of the
    regression of that sign on tanh((length_a - length_b) / scale) over all pairs, scale their root mean square;
    AlpacaEval-LC (arXiv 2404.04475) has the same regressor in a logistic model.
    """
    assert a.shape == length_a.shape, (a.shape, length_a.shape)
    assert b.shape == length_b.shape, (b.shape, length_b.shape)
    assert len(a) == len(b), (len(a), len(b))
    sign = np.sign(a[:, :, None] - b[:, None, :]).reshape(len(a), -1)  # (n, s t)
    margins = per_prompt(sign)
    longer = (length_a[:, :, None] - length_b[:, None, :]).reshape(sign.shape).astype(np.float64)
    longer[~np.isfinite(sign)] = np.nan
    scale = math.sqrt(np.nanmean(longer**2)) if np.isfinite(longer).any() else 0.0
    x = np.tanh(longer / scale) if scale else np.zeros_like(longer)
    sums = np.stack([margins, per_prompt(x), per_prompt(x * x), per_prompt(x * sign)], 1)
    won = mean(margins, draws)
    won = won._replace(**_unanimous(won))
    even = estimate(intercept_of(sums), np.isfinite(margins), draws) if scale else won
    return Duel(won, even, p_value(margins[np.isfinite(margins)]))


def _unanimous(won: Estimate) -> dict[str, float]:
    """Where all prompts agree, no resample differs; the interval is then that of n successes in n (Wilson 1927)."""
    if abs(won.value) < 1 or not won.n:
        return {}
    bound = 2 * won.n / (won.n + Z * Z) - 1  # as a margin
    return {"low": bound, "high": 1.0} if won.value > 0 else {"low": -1.0, "high": -bound}


def intercept_of(sums: Array) -> Statistic:
    """The regression's intercept, in [-1, 1], from (n, 4) means by prompt of y, x, x², xy; nan where x never varies."""
    there = np.isfinite(sums).all(1)
    filled = np.where(there[:, None], sums, 0.0)

    def statistic(weights: Array) -> Array:
        y, x, xx, xy = over((weights @ filled).T, weights @ there.astype(np.float64))
        varies = xx - x * x
        known = varies > 1e-9
        slope = (xy - x * y) / np.where(known, varies, 1.0)
        return np.where(known, np.clip(y - slope * x, -1, 1), np.nan)

    return statistic


def p_value(margins: Array) -> float:
    """Two-sided, of a mean of 0: normal, but never below 2^(1-n), which n prompts can show at most (sign flips)."""
    n = len(margins)
    if n < 2 or not margins.any():
        return 1.0
    error = float(margins.std(ddof=1)) / math.sqrt(n)
    normal = math.erfc(abs(float(margins.mean())) / error / math.sqrt(2)) if error else 0.0
    return min(1.0, max(normal, 2.0 ** (1 - n)))


def holm(ps: Sequence[float]) -> list[float]:
    """Each p-value corrected for their number (Holm 1979): below 0.05, all of them hold at once at 95 %."""
    corrected, floor = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = floor
    return corrected


# ------------------------------------------------------------------------------------------ best-of-n, frontiers


def best_of(k: int, judged: Array, measured: Array) -> Array:
    """(n,): expected `measured` score of the sample with the highest `judged` score among k. Both (n, s).

    Unbiased: the mean over all subsets of k of a prompt's m samples. The i-th lowest of m is the highest of
    C(i-1, k-1) of the C(m, k) subsets; samples that tie share their subsets. nan where m < k.
    """
    assert judged.shape == measured.shape, (judged.shape, measured.shape)
    expected = np.full(len(judged), np.nan)
    for i, (by, of) in enumerate(zip(judged, measured, strict=True)):
        there = np.isfinite(by) & np.isfinite(of)
        m = int(there.sum())
        if m < k:
            continue
        order = np.argsort(by[there], kind="stable")
        share = np.array([math.comb(rank, k - 1) / math.comb(m, k) for rank in range(m)])
        _, tie = np.unique(by[there][order], return_inverse=True)
        share = (np.bincount(tie, share) / np.bincount(tie))[tie]
        expected[i] = share @ of[there][order]
    return expected


def best_of_kl(k: int) -> float:
    """log k - (k - 1) / k nats: the KL of best-of-k to what it samples from; a bound where responses can repeat."""
    return math.log(k) - (k - 1) / k


class Fit(NamedTuple):
    """R = d (a - b d) or R = d (a - b log d), d = sqrt(KL): how a score rises and falls (arXiv 2210.10760)."""

    law: str  # "best_of_n" or "rl"
    a: Estimate
    b: Estimate
    residual: float  # root mean square
    points: int

    def curve(self, kl: Array) -> Array:
        """R at each KL."""
        d = np.sqrt(np.maximum(kl, 0.0))
        return d * (self.a.value - self.b.value * _bend(self.law, d))

    @property
    def peak_kl(self) -> float:
        """The KL at which R is highest; nan where it only rises."""
        if not self.b.value > 0 or not self.a.value > 0:
            return math.nan
        ratio = self.a.value / self.b.value
        return (ratio / 2) ** 2 if self.law == "best_of_n" else math.exp(min(2 * (ratio - 1), 50.0))


def fit(law: str, kls: Statistic, gains: Statistic, valid: Array, draws: Draws) -> Fit:
    """Least squares over a group's points. `kls`, `gains`: (r, n) -> (r, points), the points of each resample."""

    def solved(weights: Array) -> tuple[Array, Array, Array, Array]:
        d = np.sqrt(np.maximum(kls(weights), 0.0))
        x, z, r = d, -d * _bend(law, d), gains(weights)
        xx, xz, zz, xr, zr = ((p * q).sum(-1) for p, q in ((x, x), (x, z), (z, z), (x, r), (z, r)))
        det = xx * zz - xz * xz
        known = det > 1e-9 * xx * zz
        det = np.where(known, det, np.nan)
        a, b = (zz * xr - xz * zr) / det, (xx * zr - xz * xr) / det
        return a, b, d, r

    a, b, d, r = solved(np.ones((1, len(valid))))
    wrong = r[0] - d[0] * (a[0] - b[0] * _bend(law, d[0]))
    both = [estimate(lambda w, i=i: solved(w)[i], valid, draws) for i in (0, 1)]
    return Fit(law, *both, residual=float(np.sqrt(np.mean(wrong**2))), points=d.shape[1])


def _bend(law: str, d: Array) -> Array:
    return d if law == "best_of_n" else np.log(np.maximum(d, 1e-12))
