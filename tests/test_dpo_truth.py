"""On answers that can be enumerated, DPO and IPO reach the policies that their papers derive.

Eight answers of one prompt, with a true score r each. Every pair of answers is a tree, labelled both ways round, and
weighed by how often Bradley and Terry would see it so, sigmoid(r_i - r_j): the loss over infinitely many drawn pairs,
without the noise of drawing. Both losses are then convex in log p(y) / ref(y), and lowest at the closed form.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from models.tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from align.data.trees import Tree, plant
from align.models.base import Base
from align.models.trunk import Trunk
from align.objectives import losses
from align.objectives.losses import path_sums
from align.recipe.schema import Lora, Model
from align.training.reference import Reference

PROMPT = np.array([5, 17, 9], np.int32)
END, WORDS = 2, (40, 41, 42)
ANSWERS = [np.array([*words, END], np.int32) for words in [(a, b) for a in WORDS for b in WORDS][:8]]
SCORES = torch.tensor([1.5, 0.8, 0.3, 0.0, -1.6, -0.7, 2.0, -1.0])
BETA, TAU = 0.7, 0.25
NEAR = 1e-4  # nats


def forest():
    """All answers as branches of the prompt."""
    marks = [np.zeros(len(PROMPT), bool), *(np.ones(len(answer), bool) for answer in ANSWERS)]
    return plant([Tree((PROMPT, *ANSWERS), tuple(marks))])


def trunk(lora: Lora | None) -> Trunk:
    base = Base(tiny_model("llama", initializer_range=0.1), tiny_tokenizer(), "f", "tiny", "tiny")
    return Trunk(base, Model(base="tiny", dtype="float32"), lora)


def trained(loss, beta: float, steps: int = 100) -> tuple[Tensor, Tensor]:
    """log p and log ref of every answer, renormalised over them, after so many steps of Adam."""
    policy, every = trunk(Lora(r=8, alpha=16)), forest()
    assert policy.packed
    reference = Reference(policy)(every)
    better, worse = (torch.tensor(side) for side in zip(*permutations(range(len(ANSWERS)), 2), strict=True))
    share = torch.sigmoid(SCORES[better] - SCORES[worse])
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ratio = path_sums(policy(every), every.path, every.paths) - reference
        (share * loss(ratio[better] - ratio[worse], beta)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return path_sums(policy(every), every.path, every.paths).log_softmax(0), reference.log_softmax(0)


def divergence(first: Tensor, second: Tensor) -> float:
    """KL between log-probabilities."""
    return (first.exp() * (first - second)).sum().item()


@pytest.fixture(scope="module")
def dpo():
    return trained(losses.sigmoid, BETA)


def test_dpo_reaches_the_policy_that_the_true_reward_makes_best(dpo):
    """ref(y) exp(r(y) / beta) / Z (Rafailov et al. 2023, eq. 4), which lies far from where it started."""
    policy, reference = dpo
    best = (reference + SCORES / BETA).log_softmax(0)
    assert divergence(best, reference) > 0.5
    assert divergence(policy, best) < NEAR
    assert divergence(best, policy) < NEAR


@pytest.mark.parametrize("beta", [0.8 * BETA, 1.25 * BETA])
def test_another_beta_would_be_seen(dpo, beta):
    policy, reference = dpo
    assert divergence(policy, (reference + SCORES / beta).log_softmax(0)) > 100 * NEAR


def test_ipo_reaches_its_own_closed_form():
    """ref(y) exp(p*(y > mu) / tau) / Z, p* the chance to win against an answer drawn from mu, here uniform
    (Azar et al. 2023, arXiv 2310.12036, eq. 7)."""
    policy, reference = trained(losses.ipo, TAU)
    wins = torch.sigmoid(SCORES[:, None] - SCORES[None]).mean(1)  # against itself an answer wins half
    best = (reference + wins / TAU).log_softmax(0)
    assert divergence(best, reference) > 0.2
    assert divergence(policy, best) < NEAR
    assert divergence(policy, (reference + wins / (1.25 * TAU)).log_softmax(0)) > 100 * NEAR
