"""On responses that can be enumerated, PPO through its command reaches the policy that maximises reward less KL.

That policy is ref(y) exp(r(y) / beta) / Z, beta the KL coefficient, and its reward and KL are a point of the frontier
that no policy lies above: of all with its KL it has the highest reward.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from enumerable import best_policy, divergence, every_response, make_base
from world import align

from align import ppo

NEAR = 0.05  # nats; the start is 0.5 away


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("seven words"))


def trained(base, here, beta, seed, steps):
    """Every response under the policy that PPO comes to."""
    (here / "prompts.jsonl").write_text('{"text": "ask"}\n')
    recipe = {
        "stage": "ppo",
        "run": str(here / f"run-{beta}-{seed}"),
        "seed": seed,
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"train": [{"path": str(here / "prompts.jsonl")}]},
        "batch": {"examples": 1, "row_tokens": 8192},
        "optim": {"learning_rate": 0.03, "warmup": 2},
        "train": {"steps": steps, "save_every": None},
        "log": {"trackers": []},
        "ppo": {
            "rewards": [{"function": "enumerable:reward"}],
            "samples": 256,
            "generation": {"max_new": 3},
            "kl_coef": beta,
            "epochs": 2,
            "gae_lambda": 1.0,
        },
    }
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    told = align(path, stage=ppo)
    assert told.status == 0, told.err
    return every_response(base, here / recipe["run"] / "final")


def figures(policy, reference):
    """Expected reward, and KL to the reference."""
    return float((policy.exp() * reference.rewards).sum()), divergence(policy, reference.logprobs)


SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3)]


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_reaches_the_closed_form(base, here, seed):
    reference, beta = every_response(base), 0.7
    best = best_policy(reference, beta)
    assert divergence(best, reference.logprobs) > 0.5
    policy = trained(base, here, beta, seed, steps=40).logprobs
    assert divergence(policy, best) < NEAR
    # Another coefficient would be seen.
    for other in (0.5 * beta, 2 * beta):
        assert divergence(policy, best_policy(reference, other)) > 2 * NEAR


@pytest.mark.slow
def test_several_coefficients_lie_on_the_frontier(base, here):
    """Of all policies with its KL, each loses no more than a little reward; and a smaller beta goes further."""
    reference = every_response(base)
    points = [figures(trained(base, here, beta, 0, steps=40).logprobs, reference) for beta in (0.5, 1.5)]
    assert points[0][0] > points[1][0] + 0.1
    assert points[0][1] > points[1][1] + 0.2
    for reward, kl in points:
        exact = [figures(best_policy(reference, float(beta)), reference) for beta in torch.logspace(-1, 1.5, 400)]
        most = max(best for best, spent in exact if spent <= kl)
        assert -0.02 < most - reward < 0.06  # the grid's points are 0.01 apart
