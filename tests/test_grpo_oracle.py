"""On one minibatch, GRPO's loss and gradients equal TRL's, variant by variant; and so do its advantages."""

from __future__ import annotations

import pytest
import torch
from grpo_oracle import Given, advantages_of, made, ours, theirs, trainer_of
from models.tiny import tiny_trunk
from oracle import Told, assert_equal, trained

from align.grpo import ADVANTAGES
from align.models.roles import Roles
from align.objectives.importance import truncated_importance
from align.recipe.schema import Lora

TEMPERATURE = 0.7
KL = {"kl": "loss", "kl_coef": 0.3}
# Ours -> TRL's, attributes of the trainer and of its config.
VARIANTS = {
    "DeepSeekMath": ({"mean_over": "responses", "kl_unbiased": False, **KL}, {"loss_type": "grpo", "beta": 0.3}, {}),
    "DAPO": ({"clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}, {}),
    "of one batch": ({}, {"loss_type": "bnpo"}, {}),
    "Dr. GRPO": ({"mean_over": "length_free"}, {"loss_type": "dr_grpo"}, {}),
    "GSPO": (
        {"ratio": "sequence", "mean_over": "responses", "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
        {},
    ),
    "GSPO and KL": (
        {"ratio": "sequence", **KL},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.3},
        {"use_bias_correction_kl": True},
    ),
    "CISPO": ({"ratio": "cispo", "clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}, {}),
    "unbiased KL": (KL, {"loss_type": "dapo", "beta": 0.3}, {"use_bias_correction_kl": True}),
    "two-sided": ({"dual_clip": 1.4}, {"loss_type": "dapo"}, {"delta": 1.4}),
    "entropy": ({"entropy_coef": 0.2}, {"loss_type": "dapo", "entropy_coef": 0.2, "_entropy_bonus_enabled": True}, {}),
}
PLAIN = {
    "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token", "entropy_coef": 0.0,
    "_entropy_bonus_enabled": False, "use_vllm": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def roles():
    return Roles(tiny_trunk("llama", Lora(r=4, alpha=8)), Lora(r=4, alpha=8), {}, None, TEMPERATURE, critic=False)


@pytest.fixture(scope="module")
def given(roles) -> Given:
    return made(roles)


@pytest.fixture(scope="module")
def grpo(roles, tmp_path_factory):
    return trainer_of("grpo", trained(roles.trunk), tmp_path_factory.mktemp("grpo"), TEMPERATURE)


@pytest.fixture(scope="module")
def rloo(roles, tmp_path_factory):
    return trainer_of("rloo", trained(roles.trunk), tmp_path_factory.mktemp("rloo"), TEMPERATURE)


def told(trainer, given, attributes: dict, config: dict) -> Told:
    for name, value in (PLAIN | attributes).items():
        setattr(trainer, name, value)
    for name, value in ({"delta": None, "use_bias_correction_kl": False} | config).items():
        setattr(trainer.args, name, value)
    return theirs(trainer, given)


@pytest.mark.parametrize("masked", [False, True], ids=["", "unended masked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_trl(roles, given, grpo, variant, masked):
    settings, attributes, config = VARIANTS[variant]
    given = given._replace(learnt=given.episodes.ended) if masked else given
    found = ours(roles, given, **({"kl": "none"} | settings))
    expected = told(grpo, given, attributes, config)
    assert abs(found.loss) > 1e-3
    assert_equal(found._replace(loss=abs(found.loss)), expected._replace(loss=abs(expected.loss)))
    assert found.loss * expected.loss > 0


@pytest.mark.parametrize("variant", ["unbiased KL", "GSPO", "CISPO", "two-sided", "entropy"])
def test_tokens_of_another_engine_weigh_as_in_trl(roles, given, grpo, variant):
    """Its truncated importance weights multiply the policy loss, and neither KL nor entropy."""
    engine = given.old_logprobs + 0.5 * torch.randn(
        given.old_logprobs.shape, generator=torch.Generator().manual_seed(9)
    )
    mask = given.importance > 0
    weighed = given._replace(importance=truncated_importance(given.old_logprobs, engine, mask, 1.4))
    assert {0.0} < set((weighed.importance[mask] >= 1.4).float().tolist()), "some are capped"
    settings, attributes, config = VARIANTS[variant]
    found = ours(roles, weighed, **({"kl": "none"} | settings))
    expected = told(grpo, weighed, attributes | {"use_vllm": True, "vllm_importance_sampling_correction": True}, config)
    assert_equal(found._replace(loss=abs(found.loss)), expected._replace(loss=abs(expected.loss)))
    assert found.loss * expected.loss > 0
    assert found.loss != pytest.approx(ours(roles, given, **({"kl": "none"} | settings)).loss, rel=1e-3)


def test_length_unbiased_is_length_free_by_sequence(roles, given, grpo):
    """LUSPO's loss is ours times the most tokens of a response."""
    found = ours(roles, given, ratio="sequence", mean_over="length_free", kl="none")
    expected = told(grpo, given, {"loss_type": "luspo", "importance_sampling_level": "sequence"}, {})
    assert 8 * found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_rloo(roles, given, rloo):
    found = ours(roles, given, ratio="product", mean_over="responses", kl="none")
    expected = theirs(rloo, given)
    assert_equal(found._replace(loss=abs(found.loss)), expected._replace(loss=abs(expected.loss)))
    assert found.loss * expected.loss > 0


SCORES = torch.tensor([[1.0, 2.0, 6.0, float("nan")], [0.3, 0.1, 0.4, 0.1]])


@pytest.mark.parametrize(
    ("name", "scale", "samples"),
    [("group", "group", 4), ("mean", "none", 4), ("leave_one_out", None, 4), ("batch", "batch", 8)],
)
def test_advantages_are_those_of_trl(grpo, rloo, monkeypatch, name, scale, samples):
    """Of a response without a score TRL's is 0. A mean over the batch is TRL's where the batch is one group."""
    trainer = rloo if scale is None else grpo
    monkeypatch.setattr(trainer, "beta", 0.0)
    monkeypatch.setattr(trainer, "num_generations", samples)
    if scale:
        monkeypatch.setattr(trainer, "scale_rewards", scale)
    expected = advantages_of(trainer, SCORES)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ADVANTAGES[name](SCORES).nan_to_num(0.0), expected, rtol=1e-5, atol=1e-6)


def test_every_advantage_is_another():
    found = torch.stack([function(SCORES).nan_to_num() for function in ADVANTAGES.values()])
    assert all((one - other).abs().max() > 0.1 for i, one in enumerate(found) for other in found[:i])


def test_variants_differ(roles, given):
    """Else the comparisons would tell nothing."""
    losses = [ours(roles, given, **({"kl": "none"} | settings)).loss for settings, *_ in VARIANTS.values()]
    apart = torch.tensor(losses)[:, None] - torch.tensor(losses)
    same = (apart.abs() < 1e-6).nonzero().tolist()
    names = list(VARIANTS)
    assert [(names[i], names[j]) for i, j in same if i < j] == []
