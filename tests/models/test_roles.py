"""Actor, critic, reward and reference are what they claim to be, on one trunk that is in memory once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from models.tiny import stir, tiny_model, tiny_tokenizer, tree
from peft import AutoPeftModelForSequenceClassification, PeftModel
from ppo_start import make_start
from transformers import AutoModelForCausalLM

from align.data.trees import Tree, plant
from align.models.base import Base, load_base
from align.models.roles import CRITIC, Roles, Scorer, read_scorer, steps
from align.models.trunk import Trunk
from align.objectives.losses import path_counts
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

LORA = Lora(r=3, alpha=6)
KEY = "ppo.rewards.0.adapter"


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


def trunk_of(start, **section) -> Trunk:
    model = Model(base=str(start.base), dtype="float32", **section)
    return Trunk(load_base(model, torch.device("cpu"), frozen=True), model, LORA)


def roles_of(start, **section) -> tuple[Roles, Scorer]:
    trunk = trunk_of(start, **section)
    scorer = read_scorer(str(start.reward), KEY, trunk)
    return Roles(trunk, LORA, {"reward": scorer}, "reward"), scorer


def episodes(*lengths: tuple[int, ...], seed: int = 0) -> list[Tree]:
    """Prompts with responses, all of whose tokens are labels."""
    made = [tree(*own, seed=seed + i) for i, own in enumerate(lengths)]
    return [t._replace(trained=(np.zeros_like(t.trained[0]), *map(np.ones_like, t.trained[1:]))) for t in made]


TREES = episodes((9, 4, 2), (3, 5, 1, 6), (12, 3))
FOREST = plant(TREES)


def trained(roles: Roles) -> Roles:
    """As training would leave actor and critic."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in roles.parameters():
            p += 0.05 * torch.randn(p.shape, generator=draw) * p.requires_grad
    return roles


def test_the_actor_is_the_reference_until_it_is_trained(start):
    roles, _ = roles_of(start)
    reference = roles.reference(FOREST)
    assert torch.equal(roles(FOREST).logprobs, reference)
    trained(roles)
    assert torch.equal(roles.reference(FOREST), reference)
    assert (roles(FOREST).logprobs - reference).abs().max() > 0.01


def test_the_critic_starts_as_the_normalised_reward(start):
    """At every step, before each token and after the last."""
    roles, scorer = roles_of(start)
    about = json.loads((start.reward / "align.json").read_text())
    assert (scorer.mean, scorer.std) == (about["score_mean"], about["score_std"])
    values = roles(FOREST).values
    assert values.shape == (len(FOREST.labels) + FOREST.paths,)
    expected = (roles.scores("reward", FOREST, steps(FOREST)) - scorer.mean) / scorer.std
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert values.std() > 0.1
    before = values.clone()
    reward = roles.scores("reward", FOREST, FOREST.ends)
    trained(roles)
    assert (roles(FOREST).values - before).abs().max() > 0.01
    assert torch.equal(roles.scores("reward", FOREST, FOREST.ends), reward), "the reward stays as it is"


def test_without_a_reward_on_the_trunk_the_critic_is_0(start):
    roles = Roles(trunk_of(start), LORA, {}, None)
    assert torch.equal(roles(FOREST).values, torch.zeros(len(FOREST.labels) + FOREST.paths))
    (gradient,) = torch.autograd.grad(roles(FOREST).values.sum(), roles.heads[CRITIC].weight)
    assert gradient.abs().max() > 0, "its head can leave 0"


def test_steps_are_before_each_token_and_after_the_last():
    places, counts = steps(FOREST), path_counts(FOREST.path, FOREST.paths).tolist()
    assert counts == [4, 2, 5, 1, 6, 3]
    tokens = FOREST.tokens.flatten()[places].split([k + 1 for k in counts])
    expected = [np.concatenate([t.segments[0][-1:], branch]) for t in TREES for branch in t.segments[1:]]
    assert [part.tolist() for part in tokens] == [part.tolist() for part in expected]


def test_scores_are_those_of_plain_peft(start):
    """One response at a time, loaded as the docs say."""
    roles, _ = roles_of(start)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(start.reward, num_labels=1).eval()
    plain.config.pad_token_id = None
    with torch.no_grad():
        expected = [
            plain(torch.tensor(ids.astype(np.int64))[None]).logits.item() for t in TREES for ids, _ in t.paths()
        ]
        found = trained(roles).scores("reward", FOREST, FOREST.ends)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert np.std(expected) > 0.1


def test_only_actor_and_critic_train_and_nothing_is_in_memory_twice(start):
    roles, scorer = roles_of(start)
    named = dict(roles.named_parameters())
    ours = {name.rpartition(".weight")[0].rpartition(".")[2] for name, p in named.items() if "lora" in name}
    assert ours == {"default", "reward", CRITIC}
    training = {name for name, p in named.items() if p.requires_grad}
    assert training == {name for name in named if ".default" in name or CRITIC in name.split(".")}
    bare = AutoModelForCausalLM.from_pretrained(start.base)
    linear = [m for m in bare.model.modules() if isinstance(m, torch.nn.Linear)]
    size = {
        "trunk": sum(p.numel() for p in bare.parameters()),
        "actor": sum(LORA.r * (m.in_features + m.out_features) for m in linear),
        "reward and critic": 2 * sum(scorer.lora.r * (m.in_features + m.out_features) for m in linear),
        "heads": 2 * (bare.config.hidden_size + 1),
    }
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in roles.parameters()}
    assert sum(storages.values()) == 4 * sum(size.values())


def test_recomputed_activations_change_no_gradient(start):
    """Of a loss on log-probabilities, values and entropy: each layer is computed again under the role it had."""

    def gradients(**section):
        roles = roles_of(start, **section)[0]
        stir(roles.trunk)
        roles.train()
        said = roles(FOREST, entropy="learnt")
        weights = [torch.linspace(0.5, 1.5, len(part)) for part in said]
        sum((part * weight).sum() for part, weight in zip(said, weights, strict=True)).backward()
        return {name: p.grad for name, p in roles.named_parameters() if p.requires_grad}

    found, expected = gradients(gradient_checkpointing=True), gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_actor_and_critic_share_no_gradient(start):
    roles, _ = roles_of(start)
    trained(roles)
    for part, other in (("logprobs", CRITIC), ("values", "default")):
        roles.zero_grad()
        getattr(roles(FOREST), part).sum().backward()
        moved = {name for name, p in roles.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert moved
        assert not any(other in name.split(".") for name in moved)


def test_the_result_is_the_actor_alone(start, tmp_path):
    roles, _ = roles_of(start)
    trained(roles)
    weights = {name: p.detach() for name, p in roles.saved().items()}
    assert not any(CRITIC in name.split(".") for name in weights)
    roles.save(tmp_path / "final", weights, {"stage": "ppo"})
    assert {path.name for path in (tmp_path / "final").iterdir() if path.is_dir()} == set()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start.base), tmp_path / "final").eval()
    (one,) = episodes((9, 4))
    ids = torch.from_numpy(np.concatenate(one.segments).astype(np.int64))
    with torch.no_grad():
        every = plain(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(roles(plant([one])).logprobs, every[-4:], rtol=1e-5, atol=1e-5)
    saved = {key: value for key, value in plain.state_dict().items() if "lora" in key}
    assert len(saved) == 2 * 14


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0123456789abcdef"}, ("0123456789abcdef", "FINGERPRINT", "name it as `model`")),
        ({"stage": "sft"}, ("is a result of stage sft, and no reward model",)),
    ],
)
def test_a_result_that_is_no_reward_on_this_trunk_is_refused(start, tmp_path, change, said):
    folder = shutil.copytree(start.reward, tmp_path / "final")
    about = json.loads((folder / "align.json").read_text()) | change
    (folder / "align.json").write_text(json.dumps(about))
    trunk = trunk_of(start)
    with pytest.raises(UserError) as error:
        read_scorer(str(folder), KEY, trunk)
    (problem,) = error.value.problems
    assert problem.startswith(f"{KEY}: {folder} ")
    assert all(part.replace("FINGERPRINT", trunk.fingerprint) in problem for part in said)


def test_an_adapter_that_does_not_fit_is_refused(start):
    base = Base(tiny_model("gpt2"), tiny_tokenizer(), "f", "tiny", "tiny")
    trunk = Trunk(base, Model(base="tiny", dtype="float32"), LORA)
    scorer = read_scorer(str(start.reward), KEY, trunk_of(start))
    scorer = scorer._replace(lora=scorer.lora.model_copy(update={"targets": ["c_attn"]}))
    with pytest.raises(
        UserError, match=r"does not fit this trunk: it lacks base_model.model.transformer.h.0.attn.c_attn"
    ):
        Roles(trunk, LORA, {"reward": scorer}, "reward")
