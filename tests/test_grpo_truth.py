"""On responses that can be enumerated, GRPO through its command reaches the policy that maximises reward less KL, and a
student that is distilled from it reaches it too.

That policy is ref(y) exp(r(y) / beta) / Z, beta the KL coefficient, and its reward and KL are a point of the frontier
that no policy lies above: of all with its KL it has the highest reward.
"""

from __future__ import annotations

import enumerable
import pytest
import torch
import yaml
from enumerable import best_policy, divergence, every_response, make_base
from test_ppo_truth import figures
from world import align, metrics

from align import distill, grpo

BETA = 0.7
NEAR = 0.08  # nats; the start is 0.55 away


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("seven words"))


def trained(base, folder, stage, own, steps, seed=0, rate=0.03):
    """The run's folder."""
    (folder / "prompts.jsonl").write_text('{"text": "ask"}\n')
    name = stage.__name__.removeprefix("align.")
    source = {"path": str(folder / "prompts.jsonl")}
    recipe = {
        "stage": name,
        "run": str(folder / f"{name}-{seed}"),
        "seed": seed,
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"train": [source], "eval": {"sources": [source], "overlap": "keep"}},
        "batch": {"examples": 1, "row_tokens": 8192},
        "optim": {"learning_rate": rate, "warmup": 2},
        "train": {"steps": steps, "save_every": None},
        "log": {"trackers": []},
        name: {"generation": {"max_new": enumerable.LONGEST}} | own,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    told = align(path, stage=stage)
    assert told.status == 0, told.err
    return folder / recipe["run"]


def settings(beta=BETA, **more):
    of_all = {"rewards": [{"function": "enumerable:reward"}], "samples": 256, "epochs": 2, "kl_coef": beta}
    return of_all | {"advantage": "leave_one_out", "kl": "reward"} | more


@pytest.fixture(scope="module")
def teacher(base, cache, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        return trained(base, tmp_path_factory.mktemp("teacher"), grpo, settings(samples=128), steps=40) / "final"


def assert_on_the_frontier(policy, reference):
    """Of all policies with its KL it loses no more than a little reward."""
    reward, kl = figures(policy, reference)
    exact = [figures(best_policy(reference, float(beta)), reference) for beta in torch.logspace(-1, 1.5, 400)]
    most = max(best for best, spent in exact if spent <= kl)
    assert -0.02 < most - reward < 0.06  # the grid's points are 0.01 apart


def assert_best(policy, reference, near, beta=BETA):
    """It is near the closed form, and would not be with another coefficient."""
    assert divergence(policy, best_policy(reference, beta)) < near
    for other in (0.5 * beta, 2 * beta):
        assert divergence(policy, best_policy(reference, other)) > 2 * near


def test_grpo_reaches_the_closed_form(base, teacher):
    reference, policy = every_response(base), every_response(base, teacher).logprobs
    assert divergence(best_policy(reference, BETA), reference.logprobs) > 0.5
    assert_best(policy, reference, NEAR)
    assert_on_the_frontier(policy, reference)


def test_a_student_reaches_its_teacher(base, here, teacher):
    """From what it says itself; the KL that an evaluation estimates is that over all responses."""
    own = {"teacher": {"adapter": str(teacher)}, "samples": 64}
    run = trained(base, here, distill, own, steps=30)
    taught, student = (every_response(base, final).logprobs for final in (teacher, run / "final"))
    reference = every_response(base)
    assert divergence(student, taught) < 0.05
    assert_on_the_frontier(student, reference)
    before, after = metrics(run, "eval")
    assert before["kl"] == pytest.approx(divergence(reference.logprobs, taught), rel=0.25)
    assert after["kl"] == pytest.approx(divergence(student, taught), abs=0.03)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_unbiased_kl_in_the_loss_reaches_it_where_no_token_follows(base, here, monkeypatch):
    """Of one word; k3 as it is has another optimum."""
    monkeypatch.setattr(enumerable, "LONGEST", 1)
    reference, apart = every_response(base), {}
    for unbiased in (True, False):
        (here / str(unbiased)).mkdir()
        own = settings(0.4, advantage="mean", kl="loss", kl_unbiased=unbiased)
        run = trained(base, here / str(unbiased), grpo, own, steps=25, rate=0.05)
        policy = every_response(base, run / "final").logprobs
        apart[unbiased] = divergence(policy, best_policy(reference, 0.4))
    assert divergence(best_policy(reference, 0.4), reference.logprobs) > 0.3
    assert apart[True] < 0.03
    assert apart[False] > 2 * apart[True], apart


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_seeds_come_nearer_still(base, here, seed):
    """GRPO with KL in the reward to 0.05 nats of the closed form, and a student to 0.02 of it."""
    run = trained(base, here, grpo, settings(), steps=80, seed=seed)
    reference, policy = every_response(base), every_response(base, run / "final").logprobs
    assert_best(policy, reference, 0.05)
    assert_on_the_frontier(policy, reference)
    own = {"teacher": {"adapter": str(run / "final")}, "samples": 64, "divergence": ("reverse", "forward", "jsd")[seed]}
    student = every_response(base, trained(base, here, distill, own, 40, seed) / "final").logprobs
    assert divergence(student, policy) < 0.02
    assert_on_the_frontier(student, reference)
