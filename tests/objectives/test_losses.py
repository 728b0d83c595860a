"""Losses against identities between them and against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align.objectives.losses import (
    bradley_terry,
    centring,
    clipped_policy_loss,
    clipped_value_loss,
    hinge,
    ipo,
    kto,
    odds_ratio,
    orpo,
    path_counts,
    path_sums,
    preference_pairs,
    response_log_ratios,
    robust,
    sigmoid,
    simpo,
    weighted_policy_loss,
)

LOG2 = torch.tensor(2.0).log()
RATIOS = torch.linspace(-30, 30, 61, dtype=torch.float64)


def close(found: Tensor, expected: list[float] | Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=rtol)


def slope(function, at: float, **settings: float) -> float:
    point = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(point, **settings).sum(), point)[0].item()


# Tokens to paths, paths to pairs


def test_path_sums_by_hand():
    path = torch.tensor([0, 0, 2, 2, 2])
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.25, -4.0], requires_grad=True)
    sums = path_sums(logprobs, path, 4)
    assert sums.tolist() == [-3.0, 0.0, -4.75, 0.0]
    assert path_counts(path, 4).tolist() == [2, 0, 3, 0]
    (sums * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert logprobs.grad.tolist() == [1, 1, 100, 100, 100]


def test_path_sums_keep_every_digit_of_long_answers():
    """Float32 accumulation would stop growing: 2^24 + 1 = 2^24."""
    logprobs = torch.tensor([-(2.0**24), *[-1.0] * 64])
    assert path_sums(logprobs, torch.zeros(65, dtype=torch.int64), 1).item() == -(2.0**24 + 64)


def test_path_sums_refuse_labels_out_of_order():
    with pytest.raises(AssertionError, match="stand together"):
        path_sums(torch.zeros(3), torch.tensor([0, 1, 0]), 2)
    with pytest.raises(AssertionError):
        path_sums(torch.zeros(3), torch.tensor([0, 1, 2]), 2)


@pytest.mark.parametrize(
    ("adjacent", "pairs"),
    [(False, [(0, 1), (2, 3), (2, 4), (3, 4), (6, 7)]), (True, [(0, 1), (2, 3), (3, 4), (6, 7)])],
)
def test_pairs_stay_within_their_tree(adjacent, pairs):
    better, worse = preference_pairs(torch.tensor([0, 0, 1, 1, 1, 2, 3, 3]), adjacent)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == pairs


# Reward models


def test_bradley_terry():
    better, worse = torch.tensor([1.5, 0.0, -2.0]), torch.tensor([0.5, 0.0, 0.0])
    close(bradley_terry(better, worse), [0.3132617, 0.6931472, 2.1269280])  # log(1 + e^-1), log 2, log(1 + e^2)
    close(bradley_terry(better, worse, torch.tensor([1.0, -2.0, 0.0])), [0.6931472, 0.1269280, 2.1269280])
    close(centring(better, worse), [4.0, 0.0, 4.0])


def test_bradley_terry_knows_differences_alone():
    better, worse = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 4.0])
    assert torch.equal(bradley_terry(better + 8, worse + 8), bradley_terry(better, worse))
    assert torch.equal(bradley_terry(better, worse, 0.5), bradley_terry(better - 0.5, worse))
    won, lost = bradley_terry(better, worse), bradley_terry(worse, better)
    close((-won).exp() + (-lost).exp(), [1.0, 1.0])  # one of the two wins


# DPO and its kin


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
def test_policy_equal_to_the_reference_gives_log_2(beta):
    """To the last bit, label smoothing or not."""
    for dtype in (torch.float32, torch.float64):
        nothing = torch.zeros(3, dtype=dtype)
        expected = torch.full((3,), 2.0, dtype=dtype).log()
        for smoothing in (0.0, 0.1, 0.3):
            assert torch.equal(sigmoid(nothing, beta, smoothing), expected)
            assert torch.equal(robust(nothing, beta, smoothing), expected)
        assert torch.equal(hinge(nothing, beta), torch.ones(3, dtype=dtype))
        close(ipo(nothing, beta), torch.full((3,), 1 / (4 * beta**2), dtype=dtype))


def test_sigmoid_by_hand():
    close(sigmoid(torch.tensor([10.0, -10.0]), 0.1), [0.3132617, 1.3132617])
    close(sigmoid(torch.tensor([10.0, -10.0]), 0.1, 0.25), [0.5632617, 1.0632617])  # 3/4 and 1/4 of the above, mixed
    close(robust(torch.tensor([10.0, -10.0]), 0.1, 0.25), [-0.1867383, 1.8132617])  # (3/4, -1/4 of them) / (1/2)


def test_label_smoothing():
    for smoothing in (0.0, 0.1, 0.4):
        mixed = (1 - smoothing) * sigmoid(RATIOS, 0.7) + smoothing * sigmoid(-RATIOS, 0.7)
        close(sigmoid(RATIOS, 0.7, smoothing), mixed, rtol=1e-12)
    close(sigmoid(RATIOS, 0.3, 0.5), sigmoid(-RATIOS, 0.3, 0.5), rtol=1e-12)
    # Its least point is where the model believes the pair as often as it is right: sigmoid(beta h) = 1 - e.
    assert abs(slope(sigmoid, math.log(0.9 / 0.1) / 2, beta=2.0, label_smoothing=0.1)) < 1e-12


def test_robust():
    assert torch.equal(robust(RATIOS, 0.7, 0.0), sigmoid(RATIOS, 0.7))
    # Unbiased: over pairs of which a share e is flipped it has the mean of the clean loss.
    flipped = 0.8 * robust(RATIOS, 0.7, 0.2) + 0.2 * robust(-RATIOS, 0.7, 0.2)
    close(flipped, sigmoid(RATIOS, 0.7), rtol=1e-12)


def test_extreme_ratios_stay_finite():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    for loss in (sigmoid(far, 0.5, 0.1), robust(far, 0.5, 0.1), kto(far, torch.tensor([True, False]), 0.0, 0.5)):
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), far)[0].isfinite().all()


def test_ipo_and_hinge():
    assert torch.equal(ipo(torch.tensor([5.0]), 0.1), torch.zeros(1))
    close(ipo(torch.tensor([6.0, 1.0]), 0.1), [1.0, 16.0])
    assert torch.equal(hinge(torch.tensor([4.0, 5.0, 100.0]), 0.25), torch.zeros(3))
    close(hinge(torch.tensor([2.0, -4.0]), 0.25), [0.5, 2.0])


def test_slopes():
    """-beta sigmoid(-beta h), 2 (h - 1 / (2 beta)), and -beta below 1 / beta."""
    assert slope(sigmoid, 0.0, beta=0.1) == pytest.approx(-0.05, rel=1e-12)
    assert slope(sigmoid, 10.0, beta=0.1) == pytest.approx(-0.1 / (1 + math.e), rel=1e-12)
    assert slope(ipo, 0.0, beta=0.1) == pytest.approx(-10, rel=1e-12)
    assert slope(hinge, 9.0, beta=0.1) == pytest.approx(-0.1, rel=1e-12)
    assert slope(hinge, 11.0, beta=0.1) == 0


def test_simpo():
    better, worse = torch.tensor([-0.5, -1.0]), torch.tensor([-1.5, -1.0])
    close(simpo(better, worse, 2.0, 1.0), [0.3132617, 1.3132617])
    close(simpo(better, worse, 2.0, 0.0), sigmoid(better - worse, 2.0))
    close(simpo(better, worse, 2.0, 1.0), bradley_terry(2 * better, 2 * worse, 1.0))


def test_orpo():
    half, quarter = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    close(odds_ratio(half, quarter), [math.log(4 / 3)])  # odds 1 and 1/3: sigmoid(log 3) = 3/4
    close(odds_ratio(half, half), LOG2[None])
    close(orpo(half, quarter, 0.1), [math.log(2) + 0.1 * math.log(4 / 3)])
    close(orpo(half, quarter, 0.0), -half)
    # Where both are unlikely, odds are probabilities.
    close(odds_ratio(torch.tensor([-20.0]), torch.tensor([-22.0])), bradley_terry(LOG2[None] * 0 + 2, LOG2[None] * 0))


def test_orpo_of_certain_answers_stays_finite():
    sure, unsure = torch.tensor([0.0, -1e-9, -3.0], requires_grad=True), torch.tensor([-1.0, 0.0, -90.0])
    loss = orpo(sure, unsure, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert sure.grad.isfinite().all()


def test_kto_by_hand():
    ratio, desirable = torch.tensor([10.0, 10.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    # beta (h - z0) is 0.8 and 0: 1 - sigmoid(0.8) = 0.3100255, 1 - sigmoid(-0.8) = 0.6899745.
    close(kto(ratio, desirable, 2.0, 0.1), [0.3100255, 0.6899745, 0.5, 0.5])
    close(kto(ratio, desirable, 2.0, 0.1, 2.0, 3.0), [0.6200510, 2.0699234, 1.0, 1.5])


def test_kto_mirrors_desirable_and_undesirable():
    yes = torch.ones(len(RATIOS), dtype=torch.bool)
    close(kto(1.5 + RATIOS, yes, 1.5, 0.4), kto(1.5 - RATIOS, ~yes, 1.5, 0.4), rtol=1e-12)
    close(kto(RATIOS, yes, 1.5, 0.4) + kto(RATIOS, ~yes, 1.5, 0.4), torch.ones_like(RATIOS), rtol=1e-12)
    assert slope(lambda h: kto(h, yes[:1], 0.0, 0.4), 0.0) == pytest.approx(-0.1, rel=1e-12)  # -beta / 4


# PPO


def test_unchanged_policy_is_not_clipped():
    """At ratio 1 the loss is -A, its gradient -A, and no token is clipped: the first minibatch of every update."""
    logprobs = torch.tensor([-0.3, -1.7, -2.0], requires_grad=True)
    advantages = torch.tensor([2.0, -3.0, 0.0])
    loss, clipped = clipped_policy_loss(logprobs - logprobs.detach(), advantages, 0.2, 0.2, dual_clip=3.0)
    assert torch.equal(loss, -advantages)
    assert clipped.sum() == 0
    assert torch.equal(torch.autograd.grad(loss.sum(), logprobs)[0], -advantages)


def test_clipped_policy_loss_by_hand():
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 6.0])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, -2.0])
    logprobs = ratio.log().requires_grad_()
    loss, clipped = clipped_policy_loss(logprobs, advantages, 0.2, 0.2)
    close(loss, [-2.4, -1.0, 3.0, 1.6, 12.0])
    assert clipped.tolist() == [True, False, False, True, False]
    # Where the clip decides nothing pulls; elsewhere -A r.
    close(torch.autograd.grad(loss.sum(), logprobs)[0], [0.0, -1.0, 3.0, 0.0, 12.0])
    capped, _ = clipped_policy_loss(logprobs, advantages, 0.2, 0.2, dual_clip=3.0)
    close(capped, [-2.4, -1.0, 3.0, 1.6, 6.0])
    assert torch.autograd.grad(capped.sum(), logprobs)[0][-1] == 0


def test_two_clips_hold_each_its_side():
    log_ratio = torch.tensor([1.5, 1.25, 0.5, 0.85]).log()
    loss, clipped = clipped_policy_loss(log_ratio, torch.tensor([2.0, 2.0, -2.0, -2.0]), 0.1, 0.3)
    close(loss, [-2.6, -2.5, 1.8, 1.8])
    assert clipped.tolist() == [True, False, True, True]


def test_a_weight_has_no_gradient_and_no_token_is_left_out():
    """CISPO by hand: ratios 2 and 1/2 under a bound of 1.5."""
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    log_ratio = logprobs - logprobs.detach() + torch.tensor([2.0, 0.5]).log()
    loss, held = weighted_policy_loss(logprobs, log_ratio, torch.tensor([2.0, -2.0]), 0.5)
    close(loss.detach(), [3.0, -3.0])
    assert held.tolist() == [True, False]
    close(torch.autograd.grad(loss.sum(), logprobs)[0], [-3.0, 1.0])


def test_the_ratio_of_a_response_is_its_tokens_product_or_their_geometric_mean():
    """Responses of two and one tokens; every token has its response's, and its gradient goes to all of them."""
    log_ratio = torch.tensor([0.2, 0.6, -0.5], requires_grad=True)
    path = torch.tensor([0, 0, 2])
    close(response_log_ratios(log_ratio, path, 3, per_token=False).detach(), [0.8, 0.8, -0.5])
    mean = response_log_ratios(log_ratio, path, 3, per_token=True)
    close(mean.detach(), [0.4, 0.4, -0.5])
    close(torch.autograd.grad(mean[0], log_ratio)[0], [0.5, 0.5, 0.0])


def test_clipped_value_loss_by_hand():
    values = torch.tensor([1.0, 2.0, 0.1, 0.5], requires_grad=True)
    loss, clipped = clipped_value_loss(values, torch.zeros(4), torch.tensor([3.0, 1.0, 1.0, 0.0]), 0.2)
    # Held at 0.2, 0.2, 0.1, 0.2: squares 7.84 over 4, 0.64 under 1, 0.81 both, 0.04 under 0.25.
    close(loss, [3.92, 0.5, 0.405, 0.125])
    assert clipped.tolist() == [True, False, False, False]
    close(torch.autograd.grad(loss.sum(), values)[0], [0.0, 1.0, -0.9, 0.5])


def test_value_loss_of_unmoved_values_is_half_the_square():
    values, returns = torch.tensor([0.3, -4.0]), torch.tensor([1.3, -2.0])
    loss, clipped = clipped_value_loss(values, values, returns, 0.2)
    close(loss, [0.5, 2.0])
    assert clipped.sum() == 0


@pytest.mark.parametrize("function", [sigmoid, hinge, ipo])
def test_shapes_are_checked(function):
    with pytest.raises(AssertionError):
        function(torch.zeros(2, 2), 0.1)


def test_mismatched_shapes_are_refused():
    """Broadcasting (m,) against (m, 1) would make m^2 pairs without a word."""
    for function in (bradley_terry, centring, odds_ratio):
        with pytest.raises(AssertionError):
            function(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(AssertionError):
        kto(torch.zeros(2), torch.ones(2, 1, dtype=torch.bool), 0.0, 0.1)
    with pytest.raises(AssertionError):
        clipped_policy_loss(torch.zeros(2), torch.zeros(2, 1), 0.2, 0.2)
    with pytest.raises(AssertionError):
        weighted_policy_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1), 0.2)
