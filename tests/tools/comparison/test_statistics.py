"""Statistics against numbers worked by hand, identities, and the truth of a task whose responses can be enumerated."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from align.tools.comparison.statistics import best_of, best_of_kl, duel, fit, holm, p_value
from align.training.bootstrap import Draws, Estimate, estimate, mean, mean_of, per_prompt, resamples

DRAWS = Draws(400, 3)


def negated(e: Estimate) -> tuple:
    return (-e.value, -e.high, -e.low, e.n)


def world(seed: int, prompts: int = 40, holes: bool = False) -> tuple[np.ndarray, ...]:
    """Scores and lengths of two runs."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1, (prompts, 3)), rng.normal(0, 1, (prompts, 4))
    if holes:
        a[rng.random(a.shape) < 0.4] = np.nan
    return a, b, rng.integers(3, 30, a.shape), rng.integers(1, 25, b.shape)


class TestIntervals:
    def test_the_mean_is_over_prompts_then_over_those_that_count(self):
        x = np.array([[1.0, 3.0], [6.0, np.nan], [np.nan, np.nan]])
        assert per_prompt(x).tolist()[:2] == [2.0, 6.0]
        found = mean(per_prompt(x), DRAWS)
        assert (found.value, found.n) == (4.0, 2)

    def test_a_negated_figure_has_exactly_the_negated_interval(self):
        x = np.random.default_rng(0).exponential(size=57)
        assert tuple(mean(-x, DRAWS)) == negated(mean(x, DRAWS))

    def test_a_skewed_figure_has_efrons_percentiles(self):
        """Bias from the resamples; the jackknife's acceleration of a mean is its skewness / (6 sqrt(n))."""
        x, normal, draws = np.random.default_rng(0).exponential(size=60) ** 2, NormalDist(), Draws(20_000, 0)
        drawn = resamples(60, draws) @ x / 60
        bias = normal.inv_cdf((drawn < x.mean()).mean())
        acceleration = ((x - x.mean()) ** 3).mean() / x.std() ** 3 / 6 / math.sqrt(60)
        reach = 2.0010 * math.sqrt(60 / 59)  # Student's t, 59 degrees of freedom
        ends = [bias + (bias + z) / (1 - acceleration * (bias + z)) for z in (-reach, reach)]
        found = mean(x, draws)
        assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [*map(normal.cdf, ends)]), rel=4e-3)

    def test_one_prompt_has_no_interval(self):
        found = mean(np.array([2.0, np.nan]), DRAWS)
        assert found.value == 2.0
        assert math.isnan(found.low)
        assert math.isnan(found.high)

    def test_few_prompts_reach_as_far_as_students_t(self):
        # n = 5: 2.776 * s / sqrt(5); the bootstrap alone would give 1.96 * s / sqrt(5) * sqrt(4/5), a third less
        x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
        found = mean(x, Draws(20_000, 0))
        assert found.high == pytest.approx(2.776 * x.std(ddof=1) / math.sqrt(5), rel=0.12)

    def test_intervals_cover_the_truth_of_an_enumerable_task_at_their_rate(self):
        """Four kinds of prompts, six responses each: exact scores, KL and win rate are sums over all of them."""
        rng = np.random.default_rng(0)
        ref = rng.dirichlet(np.ones(6), 4)
        gold = rng.integers(0, 4, (4, 6)).astype(float)  # with ties
        policy = ref * np.exp(gold / 2)
        policy /= policy.sum(1, keepdims=True)
        ratio = np.log(policy / ref)
        signs = np.sign(gold[:, :, None] - gold[:, None, :])
        truth = {
            "gold": (policy * gold).sum(1).mean(),
            "sequence": (policy * ratio).sum(1).mean(),
            "full": (policy * ratio).sum(1).mean(),
            "margin": np.einsum("kij,ki,kj->k", signs, policy, ref).mean(),
        }
        hits = dict.fromkeys(truth, 0)
        for repetition in range(200):
            draws = Draws(500, repetition)
            kind = rng.integers(4, size=60)
            mine, start = (self.sampled(rng, p[kind], 4) for p in (policy, ref))
            scores, others = (np.take_along_axis(gold[kind], s, 1) for s in (mine, start))
            found = {
                "gold": mean(per_prompt(scores), draws),
                "sequence": mean(per_prompt(np.take_along_axis(ratio[kind], mine, 1)), draws),
                "full": mean((policy * ratio).sum(1)[kind], draws),
                "margin": duel(scores, others, np.ones_like(mine), np.ones_like(start), draws).margin,
            }
            for name, e in found.items():
                hits[name] += e.low <= truth[name] <= e.high
        # 95 % of 200 is 190; the spread of the count is 3.1
        assert all(180 <= hit <= 199 for hit in hits.values()), hits

    @staticmethod
    def sampled(rng: np.random.Generator, p: np.ndarray, samples: int) -> np.ndarray:
        return (rng.random((len(p), samples, 1)) > p.cumsum(1)[:, None, :-1]).sum(-1)


class TestDuels:
    def test_by_hand(self):
        a, b = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 5.0]])
        same = np.ones((2, 2))
        # prompt 0: a tie and three wins, 3/4; prompt 1: two ties and two losses, -1/2
        assert duel(a, b, same, same, DRAWS).margin.value == pytest.approx((0.75 - 0.5) / 2)

    @pytest.mark.parametrize("holes", [False, True])
    def test_swapped_every_figure_is_negated_exactly(self, holes):
        a, b, long_a, long_b = world(1, holes=holes)
        there, back = duel(a, b, long_a, long_b, DRAWS), duel(b, a, long_b, long_a, DRAWS)
        assert tuple(back.margin) == negated(there.margin)
        assert tuple(back.equal_length) == negated(there.equal_length)
        assert back.p == there.p
        assert there.margin.low < there.margin.value < there.margin.high

    def test_a_run_against_itself_is_even(self):
        a, _, length, _ = world(2)
        found = duel(a, a, length, length, DRAWS)
        assert found.margin[:3] == (0, 0, 0)
        assert found.equal_length.low <= 0 <= found.equal_length.high
        assert found.p == 1

    def test_unanimous_prompts_are_no_certainty(self):
        a, b, length = np.ones((10, 1)), np.zeros((10, 1)), np.ones((10, 1))
        found = duel(a, b, length, length, DRAWS)
        assert found.margin.value == found.margin.high == 1
        assert (1 + found.margin.low) / 2 == pytest.approx(10 / (10 + 1.96**2), abs=1e-3)  # Wilson, 10 of 10
        assert found.p == pytest.approx(2**-9)
        assert tuple(duel(b, a, length, length, DRAWS).margin) == negated(found.margin)

    def test_what_length_alone_has_won_is_gone_at_equal_length(self):
        rng = np.random.default_rng(5)
        long_a, long_b = rng.integers(8, 30, (200, 4)), rng.integers(5, 25, (200, 4))
        liked = lambda length: length + rng.normal(0, 12, length.shape)  # noqa: E731
        found = duel(liked(long_a), liked(long_b), long_a, long_b, DRAWS)
        assert found.margin.low > 0.05
        assert found.equal_length.low < 0 < found.equal_length.high

    def test_an_answer_without_a_score_does_not_count_by_its_length(self):
        a, b, long_a, long_b = world(4, holes=True)
        elsewhere = np.where(np.isnan(a), 10_000, long_a)
        assert duel(a, b, long_a, long_b, DRAWS) == duel(a, b, elsewhere, long_b, DRAWS)

    def test_lengths_that_never_vary_leave_nothing_to_regress_on(self):
        a, b, long_a, long_b = world(3)
        found = duel(a, b, np.full_like(long_a, 9), np.full_like(long_b, 5), DRAWS)
        assert math.isnan(found.equal_length.value)
        equal = duel(a, b, np.full_like(long_a, 5), np.full_like(long_b, 5), DRAWS)
        assert equal.equal_length == equal.margin

    def test_few_prompts_cannot_show_more_than_their_signs(self):
        assert p_value(np.array([1.0, 0.9, 1.0])) == 0.25
        assert p_value(np.array([1.0])) == 1
        margins = np.tile([1.0, -0.5], 50)  # z = 0.25 / (0.7538 / 10)
        assert p_value(margins) == pytest.approx(math.erfc(3.3166 / math.sqrt(2)), rel=1e-3)

    def test_holm_by_hand(self):
        assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
        assert holm([]) == []


class TestBestOf:
    @pytest.mark.parametrize("k", [1, 2, 3, 4])
    def test_it_is_the_mean_over_all_subsets(self, k):
        rng = np.random.default_rng(k)
        judged, measured = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
        subsets = [list(c) for c in combinations(range(4), k)]
        direct = [np.mean([m[s][j[s].argmax()] for s in subsets]) for j, m in zip(judged, measured, strict=True)]
        assert best_of(k, judged, measured) == pytest.approx(direct)

    def test_ties_share(self):
        # subsets of two: {1, 3} tie, so 2; {1, 10} and {3, 10} give 10
        judged, measured = np.array([[0.0, 0.0, 1.0]]), np.array([[1.0, 3.0, 10.0]])
        assert best_of(2, judged, measured)[0] == pytest.approx(22 / 3)

    def test_too_few_samples_count_nowhere(self):
        judged = np.array([[1.0, np.nan], [1.0, 2.0]])
        assert np.isnan(best_of(2, judged, judged)).tolist() == [True, False]

    def test_its_kl(self):
        assert best_of_kl(1) == 0
        assert best_of_kl(4) == pytest.approx(math.log(4) - 0.75)


class TestLaws:
    @pytest.mark.parametrize(("law", "peak"), [("best_of_n", (1.2 / 0.6) ** 2), ("rl", math.exp(2 * (1.2 / 0.3 - 1)))])
    def test_a_law_is_found_in_its_own_points(self, law, peak):
        d = np.array([0.5, 1.0, 2.0, 3.0])
        gain = d * (1.2 - 0.3 * (d if law == "best_of_n" else np.log(d)))
        still = lambda x: lambda weights: np.broadcast_to(x, (len(weights), len(x)))  # noqa: E731
        found = fit(law, still(d * d), still(gain), np.ones(9, bool), DRAWS)
        assert (found.a.value, found.b.value) == pytest.approx((1.2, 0.3))
        assert found.residual == pytest.approx(0, abs=1e-9)
        assert found.peak_kl == pytest.approx(peak)
        assert found.curve(d * d) == pytest.approx(gain)

    def test_its_interval_comes_from_the_prompts(self):
        rng = np.random.default_rng(0)
        d = np.array([0.5, 1.0, 2.0, 3.0])
        gains = d * (1.2 - 0.3 * np.log(d)) + rng.normal(0, 1, (80, 1)) + rng.normal(0, 0.5, (80, 4))
        begin = rng.normal(0, 1, 80)
        gain = lambda w: (w @ gains) / w.sum(1, keepdims=True)  # noqa: E731
        found = fit("rl", lambda w: np.broadcast_to(d * d, (len(w), 4)), gain, np.isfinite(begin), DRAWS)
        assert found.a.low < found.a.value < found.a.high
        assert found.a.low < 1.2 < found.a.high

    def test_a_statistic_that_often_has_no_value_has_no_interval(self):
        x = np.array([1.0, *[np.nan] * 20, 3.0])
        few = estimate(lambda w: np.where(w[:, 0] > 0, mean_of(x)(w), np.nan), np.isfinite(x), DRAWS)
        assert few.value == 2
        assert math.isnan(few.low)
