"""The trunk: packed trees give what padded paths give, nothing leaks, and roles are what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.tiny import (
    ATTENTION,
    FAMILIES,
    RECURRENT,
    VOCABULARY,
    gradients,
    stir,
    tiny_model,
    tiny_tokenizer,
    tiny_trunk,
    tree,
)
from peft import LoraConfig, get_peft_model

from align.data.graft import graft
from align.data.trees import Tree, plant
from align.models.base import Base
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

FORESTS = {
    "texts": [tree(9, seed=1), tree(1, seed=2), tree(17, seed=3)],
    "pairs": [tree(7, 6, 4, seed=4), tree(12, seed=5), tree(1, 3, 2, seed=6), tree(6, 8, 1, 9, seed=7)],
}


def laid(trunk: Trunk, layout: str):
    trunk.layout = layout
    trunk.attend("align_forest" if layout == "tree" else trunk.own_attention)
    return trunk


def close(found: dict, expected: dict, rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= rtol * scale, name


@pytest.mark.parametrize("lora", [Lora(r=4, alpha=8), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ATTENTION)
def test_trees_give_what_padded_paths_give(family, lora):
    """Trees of one path beside trees of several."""
    trunk = tiny_trunk(family, lora)
    assert trunk.layout == "tree"
    trees = [*FORESTS["texts"], *FORESTS["pairs"]]
    packed = trunk(plant(trees, multiple=8))
    packed_gradients = gradients(trunk, packed)
    padded = laid(trunk, "padded")(plant(trees, packed=False))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    close(packed_gradients, gradients(trunk, padded), 1e-4)
    assert all(g.abs().max() > 0 for name, g in packed_gradients.items() if "lora" in name)
    if lora is None and family != "gpt2":  # its last positions are past these trees
        assert packed_gradients.keys() == {name for name, p in trunk.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("lora", [Lora(r=4, alpha=8), None], ids=["lora", "full"])
def test_numbers_are_those_of_plain_transformers_and_peft(family, lora):
    """One path at a time, without mask, padding, or any layer of ours."""
    if lora and family == "mamba":  # of its layers peft takes these alone
        lora = lora.model_copy(update={"targets": ["in_proj", "x_proj"]})
    trunk, trees = tiny_trunk(family, lora), FORESTS["pairs"]
    found = trunk(plant(trees, packed=trunk.packed))
    plain = tiny_model(family).requires_grad_(lora is None)
    if lora:
        plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=lora.targets, task_type="CAUSAL_LM"))
    plain.load_state_dict(trunk.causal.state_dict())
    expected = []
    for t in trees:
        for tokens, trained in t.paths():
            ids = torch.from_numpy(tokens.astype(np.int64))
            every = plain(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            expected.append(every[torch.from_numpy(trained[1:])])
    expected = torch.cat(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = {name.removeprefix("causal."): g for name, g in gradients(trunk, found).items()}
    close(ours, gradients(plain, expected), 1e-4)


@pytest.mark.parametrize("family", RECURRENT)
def test_layers_that_trees_leak_through_take_the_padded_layout(family):
    trunk = tiny_trunk(family, None)
    assert trunk.layout == "padded"
    trees = FORESTS["pairs"]
    together = trunk(plant(trees, packed=False))
    apart = torch.cat([trunk(plant([t], packed=False)) for t in trees])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ATTENTION)
def test_what_changes_in_one_branch_stays_there(family):
    """Change one branch, then one whole tree: every log-probability that may not see it keeps its bits."""
    trunk = tiny_trunk(family, Lora(r=4))
    trees = [tree(*t, seed=s, share=1.0) for s, t in enumerate([(7, 6, 4, 5), (12,), (3, 8, 2)])]

    def other(segment: np.ndarray) -> np.ndarray:
        return (segment + 1) % VOCABULARY

    def logprobs(trees: list[Tree]) -> tuple[torch.Tensor, ...]:
        forest = plant(trees)
        with torch.no_grad():
            every = trunk(forest)
        counts = [int(marks.sum()) - (s == 0) for t in trees for s, marks in enumerate(t.trained)]
        return every.split(counts)  # stem and branches, tree by tree

    before = logprobs(trees)
    for t, s, touched in [(0, 1, {1}), (0, 3, {3}), (1, 0, {4}), (2, 2, {7}), (0, 0, {0, 1, 2, 3})]:
        segments = list(trees[t].segments)
        segments[s] = other(segments[s])
        changed = [*trees]
        changed[t] = trees[t]._replace(segments=tuple(segments))
        after = logprobs(changed)
        moved = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)}
        assert moved == touched


def test_the_actor_is_the_reference_until_it_is_trained():
    def on_base(lora: Lora | None) -> Trunk:
        base = Base(tiny_model("llama"), tiny_tokenizer(), "f", "tiny", "tiny")
        return Trunk(base, Model(base="tiny", dtype="float32"), lora)

    forest = plant(FORESTS["pairs"])
    alone, trunk = on_base(None)(forest), on_base(Lora())
    start = trunk(forest)
    assert (start - alone).abs().max() < 1e-5
    with trunk.acting(None) as reference:
        assert torch.equal(reference(forest), start)
    trained = stir(trunk)(forest)
    assert (trained - start).abs().max() > 0.01
    with trunk.acting(None) as reference, torch.no_grad():
        assert torch.equal(reference(forest), start)
    assert torch.equal(trunk(forest), trained)


def test_only_adapters_train_and_their_first_values_follow_the_seed():
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        base = Base(tiny_model("llama"), tiny_tokenizer(), "f", "tiny", "tiny")
        trunk = Trunk(base, Model(base="tiny", dtype="float32"), Lora(r=4), seed)
        return {name: p for name, p in trunk.named_parameters() if p.requires_grad}

    first, again, other = adapters(1), adapters(1), adapters(2)
    linear = 2 * len(("q", "k", "v", "o", "gate", "up", "down"))
    assert len(first) == 2 * linear
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in first.items())
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert all(not torch.equal(p, other[name]) for name, p in first.items() if "lora_A" in name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_change_no_gradient(family):
    def found(**settings) -> dict[str, torch.Tensor]:
        base = Base(tiny_model(family), tiny_tokenizer(), "f", "tiny", "tiny")
        trunk = stir(Trunk(base, Model(base="tiny", dtype="float32", **settings), Lora(r=4)))
        trunk.train()
        return gradients(trunk, trunk(plant(FORESTS["pairs"])))

    close(found(gradient_checkpointing=True), found(), 1e-6)


def test_generating_leaves_the_trunk_as_it_was():
    trunk = tiny_trunk("llama", Lora(r=4))
    trunk.train()
    before = trunk(plant(FORESTS["pairs"]))
    prompt = torch.tensor([[5, 9, 17]])
    with trunk.generating() as model:
        assert not model.training
        ids = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=2, eos_token_id=2)
        best = model(input_ids=prompt).logits[0, -1].argmax()
    assert ids[0, 3] == best
    assert trunk.training
    assert torch.equal(trunk(plant(FORESTS["pairs"])), before)


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("llama", ["q_prj"], "q_prj"),
        ("mamba", "all-linear", "out_proj"),
        ("qwen2", ["q_proj", "lm_head"], "the output head takes no adapter"),
        ("llama", ["lm_head"], "the output head takes no adapter"),
    ],
)
def test_targets_that_take_no_adapter_are_told(family, targets, said):
    with pytest.raises(UserError) as error:
        tiny_trunk(family, Lora(targets=targets))
    (problem,) = error.value.problems
    assert problem.startswith("lora.targets: ")
    assert said in problem
    assert "\n" not in problem


def test_one_stem_for_trees_that_begin_alike_changes_no_loss_and_no_gradient():
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    opening = tree(12, seed=1, share=0.0).segments[0]
    alike = [tree(*lengths, seed=len(lengths)) for lengths in ((5,), (9, 3, 4), (2, 6), (4, 1, 2, 3))]
    trees = [
        Tree(
            (np.concatenate([opening, t.segments[0]]), *t.segments[1:]),
            (np.concatenate([np.zeros(12, bool), t.trained[0]]), *t.trained[1:]),
        )
        for t in alike
    ]
    trees += FORESTS["texts"]
    grafted = graft(trees)
    assert [len(t.segments) for t in grafted] == [11, 1, 1, 1]
    assert sum(t.packed_length for t in grafted) < sum(t.packed_length for t in trees)
    one_by_one, shared = trunk(plant(trees)), trunk(plant(grafted))
    expected = gradients(trunk, one_by_one)
    torch.testing.assert_close(shared.sum(), one_by_one.sum(), rtol=1e-6, atol=1e-5)
    close(gradients(trunk, shared), expected, 1e-4)


def test_full_fine_tuning_in_bfloat16_computes_in_it_and_keeps_float32_weights():
    exact = tiny_trunk("llama", None)
    base = Base(tiny_model("llama"), tiny_tokenizer(), "f", "tiny", "tiny")
    mixed = Trunk(base, Model(base="tiny", dtype="bfloat16", layout="tree"), None)
    assert mixed.dtype == torch.bfloat16
    forest = plant(FORESTS["pairs"])
    found, expected = mixed(forest), exact(forest)
    assert (found - expected).abs().median() < 0.1
    grown, wanted = gradients(mixed, found), gradients(exact, expected)
    assert {g.dtype for g in grown.values()} == {torch.float32}
    for name, gradient in wanted.items():
        assert (grown[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_logits_that_are_more_than_the_head_are_refused():
    """A multiplier that the trunk does not know would make every loss wrong without a word."""
    model = tiny_model("cohere")
    model.config.logit_scale = None  # what the trunk reads; the model goes on with its own
    assert model.logit_scale == 0.25
    base = Base(model, tiny_tokenizer(), "f", "tiny", "tiny")
    with pytest.raises(UserError, match="computes its logits in a way that align does not know"):
        Trunk(base, Model(base="tiny", layout="tree"), Lora(r=4))
