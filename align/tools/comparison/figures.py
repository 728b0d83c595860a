"""The figures of a comparison: every run, every pair, best-of-n of the start, and the laws of over-optimisation.

All of it is a function of the folders' content, the seed and the number of resamples: equal inputs, equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

from align.tools.comparison.evaluated import Evaluated
from align.tools.comparison.statistics import Fit, best_of, best_of_kl, duel, fit, holm
from align.training.bootstrap import Draws, Estimate, Statistic, mean, mean_of, per_prompt

ALIKE = 0.2  # two KLs are alike that differ by at most this share of the larger
FEW = 10  # so many pairs are all corrected for and told; of more, only those that answer a question
SURE = 0.05


class Cost(NamedTuple):
    """What training took, where it was recorded. Two equal runs differ in it, so it is no part of compare.json."""

    device_seconds: float | None = None
    peak_memory_bytes: int | None = None
    tokens_sampled: int | None = None


class Figures(NamedTuple):
    """One run, its means over prompts."""

    name: str
    group: str
    path: str
    policy: str
    baseline: bool
    samples: int
    excluded: dict[str, int]  # answers without the score
    scores: dict[str, Estimate]
    kl_sequence: Estimate  # mean of logprob - ref_logprob over answers, nats
    kl_full: Estimate | None  # mean over answers of the sum over tokens of KL(policy || reference), nats
    tokens: Estimate
    ended: Estimate
    sampling: dict[str, Any]  # how its answers were drawn
    settings: dict[str, Any]
    cost: Cost
    metrics: dict[str, dict[str, float | None]]  # as align.evaluate measured them
    judges: dict[str, Any]


class Pair(NamedTuple):
    """Two runs head to head, from the first one's side; numbers of runs as in `Comparison.runs`."""

    a: int
    b: int
    win_rate: Estimate
    win_rate_equal_length: Estimate
    score_difference: Estimate
    p: float
    p_holm: float | None  # corrected for all pairs that have one; None for a pair that answers no question
    alike: bool  # nearest of their groups, at like KL

    @property
    def sure(self) -> bool:
        """Whether one of the two is shown to win: by the interval and, where corrected, after correction."""
        away = not self.win_rate.low <= 0.5 <= self.win_rate.high and math.isfinite(self.win_rate.low)
        return away and (self.p if self.p_holm is None else self.p_holm) < SURE


class BestOf(NamedTuple):
    """Best of n samples of the baseline."""

    n: int
    by: str  # the score it is chosen by
    kl: float
    score: Estimate
    proxy: Estimate | None


class GroupFit(NamedTuple):
    """The law of over-optimisation in one group, for the score's gain over the baseline."""

    group: str
    fit: Fit


class Comparison(NamedTuple):
    """Everything a report says."""

    score: str
    proxy: str | None
    kl: str  # which estimate orders and matches runs: "full" or "sequence"
    prompts: int
    draws: Draws
    runs: list[Figures]
    pairs: list[Pair]
    best_of: list[BestOf]
    fits: list[GroupFit]

    @property
    def groups(self) -> dict[str, list[int]]:
        """Runs by group, without the baseline."""
        found: dict[str, list[int]] = {}
        for i, run in enumerate(self.runs):
            if not run.baseline:
                found.setdefault(run.group, []).append(i)
        return found

    @property
    def baseline(self) -> int | None:
        """The run that the others started from."""
        return next((i for i, run in enumerate(self.runs) if run.baseline), None)

    def kl_of(self, i: int) -> Estimate:
        """The KL of a run that orders and matches it."""
        run = self.runs[i]
        return run.kl_full if self.kl == "full" and run.kl_full else run.kl_sequence

    def score_of(self, i: int) -> Estimate:
        """The run's mean score."""
        return self.runs[i].scores[self.score]

    def best(self, group: str) -> int:
        """The run of the group with the highest mean score."""
        return max(self.groups[group], key=lambda i: (self.score_of(i).value, self.runs[i].name))

    def pair(self, i: int, j: int) -> Pair:
        """The two runs head to head, in the order of the list."""
        return next(pair for pair in self.pairs if (pair.a, pair.b) == (min(i, j), max(i, j)))


def compare(
    runs: Sequence[Evaluated],
    baseline: int | None,
    score: str,
    proxy: str | None,
    best_ofs: Sequence[int],
    draws: Draws,
) -> Comparison:
    """All figures. `runs` were checked to be alike; `baseline` is the number of the one that they started from."""
    figures = [_figures(run, i == baseline, draws) for i, run in enumerate(runs)]
    full = all(run.kl_full for run in figures)
    kl = "full" if full else "sequence"
    result = Comparison(score, proxy, kl, len(runs[0].keys), draws, figures, [], [], [])
    result = result._replace(pairs=_pairs(result, runs, draws))
    if baseline is None:
        return result
    start = runs[baseline]
    result = result._replace(best_of=list(_best_ofs(start, score, proxy, best_ofs, draws)))
    return result._replace(fits=list(_fits(result, runs, start)))


def _figures(run: Evaluated, baseline: bool, draws: Draws) -> Figures:
    training = run.about.training
    return Figures(
        name=run.name,
        group=run.group,
        path=str(run.path),
        policy=run.about.policy,
        baseline=baseline,
        samples=run.samples,
        excluded={score: run.excluded(score) for score in sorted(run.scores)},
        scores={score: mean(per_prompt(x), draws) for score, x in sorted(run.scores.items())},
        kl_sequence=mean(per_prompt(run.log_ratio), draws),
        kl_full=mean(per_prompt(run.kl), draws) if np.isfinite(run.kl).any() else None,
        tokens=mean(per_prompt(run.lengths), draws),
        ended=mean(per_prompt(run.ended), draws),
        settings=training.settings if training else {},
        sampling=run.about.sampling,
        cost=Cost(*(getattr(training, name, None) for name in Cost._fields)),
        metrics=run.about.metrics,
        judges=run.about.judges,
    )


# ------------------------------------------------------------------------------------------------------- pairs


def _pairs(result: Comparison, runs: Sequence[Evaluated], draws: Draws) -> list[Pair]:
    score, alike = result.score, _alike(result)
    told = {frozenset(pair) for pair in combinations(range(len(runs)), 2)}
    if len(told) > FEW:
        told = alike | {frozenset((result.best(g), result.best(h))) for g, h in combinations(result.groups, 2)}
        if result.baseline is not None:
            told |= {frozenset((i, result.baseline)) for i in range(len(runs)) if i != result.baseline}
    pairs = []
    for i, j in combinations(range(len(runs)), 2):
        a, b = runs[i], runs[j]
        won = duel(a.scores[score], b.scores[score], a.lengths, b.lengths, draws)
        apart = mean(per_prompt(a.scores[score]) - per_prompt(b.scores[score]), draws)
        rates = _share(won.margin), _share(won.equal_length)
        pairs.append(Pair(i, j, *rates, apart, won.p, None, frozenset((i, j)) in alike))
    claimed = [n for n, pair in enumerate(pairs) if frozenset((pair.a, pair.b)) in told]
    for n, p in zip(claimed, holm([pairs[n].p for n in claimed]), strict=True):
        pairs[n] = pairs[n]._replace(p_holm=p)
    return pairs


def _share(margin: Estimate) -> Estimate:
    return Estimate(*((1 + x) / 2 for x in margin[:3]), margin.n)


def at_like_kl(c: Comparison, i: int, j: int) -> bool:
    """Whether two runs are equally far from the reference, or nearly so; an estimate below 0 counts as 0."""
    low, high = sorted(max(c.kl_of(k).value, 0.0) for k in (i, j))
    return high - low <= ALIKE * high


def _alike(result: Comparison) -> set[frozenset[int]]:
    """Runs of different groups at like KL, each the other's nearest in sqrt(KL). The choice does not see scores."""

    def far(i: int, j: int) -> tuple[float, str]:
        d = [math.sqrt(max(result.kl_of(k).value, 0.0)) for k in (i, j)]
        return abs(d[0] - d[1]), result.runs[j].name

    found = set()
    for g, h in combinations(result.groups.values(), 2):
        for i, j in product(g, h):
            nearest = min(h, key=lambda k: far(i, k)) == j and min(g, key=lambda k: far(j, k)) == i
            if nearest and at_like_kl(result, i, j):
                found.add(frozenset((i, j)))
    return found


# ---------------------------------------------------------------------------------------- best-of-n and the laws


def _best_ofs(start: Evaluated, score: str, proxy: str | None, ns: Sequence[int], draws: Draws) -> Iterator[BestOf]:
    """By the proxy, as one could do it, and by the score itself, as only one who knows it can."""
    for by in filter(None, (proxy, score)):
        for n in sorted(set(ns)):
            own = mean(best_of(n, start.scores[by], start.scores[score]), draws)
            if own.n:
                other = mean(best_of(n, start.scores[by], start.scores[proxy]), draws) if proxy else None
                yield BestOf(n, by, best_of_kl(n), own, other)


def _fits(result: Comparison, runs: Sequence[Evaluated], start: Evaluated) -> Iterator[GroupFit]:
    """For each group with three points or more away from the baseline."""
    begin = per_prompt(start.scores[result.score])
    for group, members in result.groups.items():
        away = [i for i in members if result.kl_of(i).value > 0]
        if len(away) >= 3:
            xs = [per_prompt(runs[i].kl if result.kl == "full" else runs[i].log_ratio) for i in away]
            ys = [per_prompt(runs[i].scores[result.score]) for i in away]
            yield GroupFit(group, fit("rl", _means(xs), _gains(ys, begin), _counted([*xs, *ys, begin]), result.draws))
    for by in dict.fromkeys(point.by for point in result.best_of):
        ns = [point.n for point in result.best_of if point.by == by and point.n > 1]
        if len(ns) >= 3:
            kls = np.array([best_of_kl(n) for n in ns])
            ys = [best_of(n, start.scores[by], start.scores[result.score]) for n in ns]
            fixed = partial(_constant, kls)
            yield GroupFit(
                f"best of n by {by}", fit("best_of_n", fixed, _gains(ys, begin), _counted([*ys, begin]), result.draws)
            )


def _means(xs: Sequence[Array]) -> Statistic:
    return lambda weights: np.stack([mean_of(x)(weights) for x in xs], -1)


def _gains(ys: Sequence[Array], begin: Array) -> Statistic:
    return lambda weights: _means(ys)(weights) - mean_of(begin)(weights)[:, None]


def _constant(xs: Array, weights: Array) -> Array:
    return np.broadcast_to(xs, (len(weights), len(xs)))


def _counted(xs: Sequence[Array]) -> Array:
    return np.isfinite(np.stack(xs)).all(0)
