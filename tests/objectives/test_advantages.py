"""Advantages, whitening and KL estimates against numbers worked by hand and against what they must equal."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.objectives.advantages import adapted, by_path, gae, k1, k2, k3, mean_variance, moments, whiten

# Two responses of two tokens and one: three steps and two, the last of which brings the score.
REWARDS = torch.tensor([[0.0, -1.0, 2.0], [1.0, 3.0, 77.0]])
VALUES = torch.tensor([[1.0, 2.0, 4.0], [0.5, -1.0, 99.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def close(found: Tensor, expected: object, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=rtol)


def rollout(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 8, (5,), generator=draw)
    mask = torch.arange(int(steps.max())) < steps[:, None]
    rewards, values = (torch.randn(mask.shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return rewards, values, mask


def test_gae_by_hand():
    """gamma 1/2, lambda 1/2: d = (0, -1, -2) and (0, 4); A_t = d_t + A_{t+1} / 4."""
    advantages, returns = gae(REWARDS, VALUES, MASK, 0.5, 0.5)
    close(advantages, [[-0.375, -1.5, -2.0], [1.0, 4.0, 0.0]])
    close(returns, [[0.625, 0.5, 2.0], [1.5, 3.0, 0.0]])


@pytest.mark.parametrize("seed", range(3))
def test_with_gamma_and_lambda_1_it_is_reward_to_go_minus_value(seed):
    rewards, values, mask = rollout(seed)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    close(advantages, (to_go - values) * mask, rtol=1e-12)
    close(returns, to_go * mask, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_with_lambda_0_it_is_the_td_residual(seed):
    rewards, values, mask = rollout(seed)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(values), 1)], 1)
    advantages, returns = gae(rewards, values, mask, 0.9, 0.0)
    close(advantages, (rewards + 0.9 * following - values) * mask, rtol=1e-12)
    close(returns, (rewards + 0.9 * following) * mask, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gae_is_the_weighted_sum_of_residuals(seed):
    """Eq. 16 forwards: A_t = sum over k of (gamma lambda)^k d_{t+k}."""
    rewards, values, mask = rollout(seed)
    residuals, _ = gae(rewards, values, mask, 0.9, 0.0)
    steps = torch.arange(mask.shape[1])
    weights = torch.triu(0.72 ** (steps[None] - steps[:, None]).clamp(min=0).double())
    close(gae(rewards, values, mask, 0.9, 0.8)[0], residuals @ weights.T * mask, rtol=1e-12)


def test_right_values_leave_no_advantage():
    """Where each value is the discounted reward to go, nothing was better or worse than expected, for any lambda."""
    rewards, _, mask = rollout(0)
    _, values = gae(rewards, torch.zeros_like(rewards), mask, 0.9, 1.0)
    for lam in (0.0, 0.5, 1.0):
        close(gae(rewards, values, mask, 0.9, lam)[0], torch.zeros_like(values), rtol=1e-12)


def test_nothing_behind_the_mask_is_felt():
    rewards, values, mask = rollout(1)
    clean = gae(rewards, values, mask, 0.9, 0.8)
    spoilt = gae(rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.inf), mask, 0.9, 0.8)
    for one, other in zip(clean, spoilt, strict=True):
        assert torch.equal(one, other)
        assert (one[~mask] == 0).all()


def test_a_mask_with_holes_is_refused():
    with pytest.raises(AssertionError, match="left"):
        gae(REWARDS, VALUES, torch.tensor([[True, False, True]] * 2), 1.0, 1.0)


def test_policy_steps_of_the_value_mask():
    """k tokens of k + 1 steps: the slices that the module names."""
    advantages, _ = gae(REWARDS, VALUES, MASK, 0.5, 0.5)
    close(advantages[:, :-1][MASK[:, 1:]], [-0.375, -1.5, 1.0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any))
def test_by_path_and_back(counts):
    path = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    flat = torch.arange(1.0, len(path) + 1)
    grid, mask = by_path(flat, path, len(counts))
    assert grid.shape == (len(counts), max(counts))
    assert mask.sum(1).tolist() == counts
    assert torch.equal(grid[mask], flat)
    assert (grid[~mask] == 0).all()
    assert [row[row > 0].tolist() for row in grid] == [flat[path == p].tolist() for p in range(len(counts))]


# Whitening


def test_moments_and_whitening_by_hand():
    """1, 2, 3, 6: mean 3, squared distances 4 + 1 + 0 + 9 = 14, unbiased variance 14 / 3."""
    values = torch.tensor([[1.0, 2.0, -50.0], [3.0, 6.0, 50.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert moments(values, mask).tolist() == [4.0, 12.0, 50.0]
    mean, variance = mean_variance(moments(values, mask))
    assert mean.item() == 3
    assert variance.item() == pytest.approx(14 / 3, rel=1e-12)
    close(whiten(values, mask, mean, variance), [[-0.9258201, -0.4629100, 0.0], [0.0, 1.3887301, 0.0]])
    close(whiten(values, mask, 1.0, 4.0), [[0.0, 0.5, 0.0], [1.0, 2.5, 0.0]])
    assert whiten(values, mask, mean, variance).dtype == torch.float32


def test_moments_of_parts_add_up():
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 100
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    parts = moments(values[:3], mask[:3]) + moments(values[3:], mask[3:])
    mean, variance = mean_variance(parts)
    assert mean.item() == pytest.approx(values[mask].double().mean().item(), rel=1e-12)
    assert variance.item() == pytest.approx(values[mask].double().var().item(), rel=1e-9)


@pytest.mark.parametrize(("value", "count"), [(0.1, 4), (-777.7, 5003), (1e5 / 3, 5003)])
def test_equal_values_whiten_to_0(value, count):
    """Rounding must not leave a variance below 0."""
    values, mask = torch.full((count,), value), torch.ones(count, dtype=torch.bool)
    mean, variance = mean_variance(moments(values, mask))
    assert variance >= 0
    assert whiten(values, mask, mean, variance).abs().max() < 1e-3


def test_a_single_value_has_no_spread():
    assert mean_variance(moments(torch.tensor([5.0, 7.0]), torch.tensor([False, True]))) == (7.0, 0.0)


# KL


def test_estimators_by_hand():
    logprobs, ref = torch.tensor([0.5, 0.5, 0.25]).log(), torch.tensor([0.5, 0.25, 0.5]).log()
    assert torch.equal(k1(logprobs, logprobs), torch.zeros(3))
    assert torch.equal(k3(logprobs, logprobs), torch.zeros(3))
    close(k1(logprobs, ref), [0.0, 0.6931472, -0.6931472])
    close(k2(logprobs, ref), [0.0, 0.2402265, 0.2402265])
    close(k3(logprobs, ref), [0.0, 0.1931472, 0.3068528])  # 1/2 - 1 + log 2, and 2 - 1 - log 2


def test_estimators_have_the_divergence_as_their_mean():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(9, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    divergence = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert divergence > 0.1
    close((p.exp() * k1(p, q)).sum(), divergence, rtol=1e-12)
    close((p.exp() * k3(p, q)).sum(), divergence, rtol=1e-12)
    assert (k1(p, q) < 0).any()
    assert (k2(p, q) >= 0).all()
    assert (k3(p, q) >= 0).all()
    near = (q + 1e-3 * (p - q)).log_softmax(0)  # k2 is right to second order
    exact = torch.nn.functional.kl_div(q, near, reduction="sum", log_target=True)
    close((near.exp() * k2(near, q)).sum() / exact, 1.0, rtol=2e-3)


def test_adaptive_coefficient():
    assert adapted(0.2, 6.0, target=6.0, horizon=1000, steps=100) == 0.2
    assert adapted(0.2, 6.6, target=6.0, horizon=1000, steps=100) == pytest.approx(0.2 * 1.01)
    assert adapted(0.2, 60.0, target=6.0, horizon=1000, steps=100) == pytest.approx(0.2 * 1.02)
    assert adapted(0.2, -5.0, target=6.0, horizon=1000, steps=100) == pytest.approx(0.2 * 0.98)


def test_a_kl_coefficient_stays_positive():
    """Of more responses than the horizon, each horizon counts by itself: 0.8 at most, and all continuous in between."""
    assert adapted(0.2, 0.0, target=6.0, horizon=100, steps=100) == pytest.approx(0.2 * 0.8)
    assert adapted(0.2, 0.0, target=6.0, horizon=100, steps=250) == pytest.approx(0.2 * 0.8**2 * 0.9)
    assert adapted(0.2, 60.0, target=6.0, horizon=1, steps=3) == pytest.approx(0.2 * 1.2**3)
    coefficients = [adapted(0.2, 0.0, target=6.0, horizon=16, steps=steps) for steps in range(1, 400)]
    assert all(0 < late < early for early, late in pairwise(coefficients))
