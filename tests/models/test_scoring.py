"""Heads on the trunk: a path's score is that of its last token, in either layout, and loads in plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.tiny import ATTENTION, RECURRENT, SIZES, VOCABULARY, save_encoder, stir, tiny_model, tiny_tokenizer, tree
from peft import LoraConfig, get_peft_model
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
)

from align.data.trees import plant
from align.models.base import Base, load_base
from align.models.scoring import is_encoder, with_head
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

TREES = [tree(7, 6, 4, seed=4), tree(12, seed=5), tree(1, 3, 2, seed=6), tree(6, 8, 1, 9, seed=7)]
PATHS = 2 + 1 + 2 + 3
HEADS = [
    family
    for family in (*ATTENTION, *RECURRENT)
    if type(tiny_model(family).config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
]
LORA = Lora(r=4, alpha=8)


def scorer(family: str, lora: Lora | None = LORA, outputs: int = 1, layout: str = "auto") -> Trunk:
    model = with_head(tiny_model(family), outputs, seed=3)
    base = Base(model, tiny_tokenizer(), "fingerprint", f"tiny/{family}", f"tiny/{family}")
    return stir(Trunk(base, Model(base=base.name, dtype="float32", layout=layout), lora, outputs=outputs))


def gradients(trunk: Trunk, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum in which every score weighs differently."""
    trained = {name: p for name, p in trunk.named_parameters() if p.requires_grad}
    weights = torch.linspace(0.5, 1.5, scores.numel()).view_as(scores)
    found = torch.autograd.grad((scores * weights).sum(), list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


def test_most_families_have_a_head():
    assert {"llama", "qwen2", "qwen3", "gpt2", "mistral-window", "gemma", "gemma2", "gemma3"} <= set(HEADS)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", HEADS)
def test_trees_score_as_padded_paths_do(family, lora):
    """Values, and gradients of adapter and head alike."""
    packed, padded = scorer(family, lora), scorer(family, lora, layout="padded")
    assert packed.layout == "tree"
    one, other = packed(plant(TREES, multiple=8)), padded(plant(TREES, packed=False))
    assert one.shape == (PATHS, 1)
    assert one.dtype == torch.float32
    assert len(one.unique()) == PATHS
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    grown = gradients(packed, one)
    assert any("score" in name for name in grown)
    assert all(g.abs().max() > 0 for name, g in grown.items() if "lora" in name or "score" in name)
    assert_close(grown, gradients(padded, other))


@pytest.mark.parametrize("family", HEADS)
def test_scores_are_those_of_plain_transformers_and_peft(family):
    """One path at a time, read at its last token, without any layer of ours."""
    trunk = scorer(family, outputs=3)
    with torch.no_grad():
        found = trunk(plant(TREES, packed=trunk.packed))
    config = tiny_model(family).config
    config.num_labels, config.pad_token_id = 3, None
    plain = AutoModelForSequenceClassification.from_config(config)
    plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=LORA.targets, task_type="SEQ_CLS"))
    plain.load_state_dict(trunk.causal.state_dict())
    plain.eval()
    paths = [torch.from_numpy(tokens.astype(np.int64))[None] for t in TREES for tokens, _ in t.paths()]
    with torch.no_grad():
        expected = torch.cat([plain(ids).logits for ids in paths])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_what_changes_in_one_branch_stays_there(family):
    """Change one segment: every score that may not see it keeps its bits."""
    trunk = scorer(family)

    def scores(trees):
        with torch.no_grad():
            return trunk(plant(trees))[:, 0]

    before = scores(TREES)
    for t, s, touched in [(0, 1, {0}), (0, 2, {1}), (0, 0, {0, 1}), (1, 0, {2}), (2, 1, {3}), (3, 2, {6}), (3, 3, {7})]:
        segments = list(TREES[t].segments)
        segments[s] = (segments[s] + 1) % VOCABULARY
        after = scores([*TREES[:t], TREES[t]._replace(segments=tuple(segments)), *TREES[t + 1 :]])
        assert set(torch.nonzero(after != before).flatten().tolist()) == touched


def test_the_head_follows_the_seed_and_trains_beside_the_adapter():
    first, again, other = (with_head(tiny_model("llama"), 2, seed).score.weight.detach() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() == pytest.approx((SIZES["hidden_size"] + 1) ** -0.5, rel=0.4)
    trained = {name for name, p in scorer("llama").named_parameters() if p.requires_grad}
    assert [name for name in trained if "lora" not in name] == [
        "causal.base_model.model.score.modules_to_save.default.weight"
    ]


def test_a_head_is_float32_on_a_bfloat16_trunk():
    model = with_head(tiny_model("llama").bfloat16(), 1, seed=3)
    base = Base(model, tiny_tokenizer(), "f", "tiny", "tiny")
    trunk = stir(Trunk(base, Model(base="tiny", dtype="bfloat16", layout="tree"), LORA, outputs=1))
    found = trunk(plant(TREES))
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())  # not rounded on its way
    assert (found - scorer("llama")(plant(TREES))).abs().median() < 0.1


@pytest.mark.parametrize("lora", [Lora(r=4, alpha=8, targets=["query", "value"]), None], ids=["lora", "full"])
def test_an_encoder_scores_whole_padded_rows(tmp_path, lora):
    section = Model(base=str(save_encoder(tmp_path / "bert")), dtype="float32")
    base = load_base(section, torch.device("cpu"), frozen=lora is not None, seed=5, outputs=2)
    trunk = stir(Trunk(base, section, lora, outputs=2)).eval()
    assert (trunk.layout, trunk.layout_reason) == ("padded", "the base reads in both directions")
    trees = [tree(n, seed=n) for n in (9, 4, 13)]
    together = trunk(plant(trees, packed=False))
    assert together.shape == (3, 2)
    with torch.no_grad():
        alone = torch.cat([trunk.plain(torch.from_numpy(t.segments[0].astype(np.int64))[None]).logits for t in trees])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    turned = trees[0]._replace(segments=(np.concatenate([trees[0].segments[0][1:], trees[0].segments[0][:1]]),))
    assert not torch.equal(trunk(plant([turned, *trees[1:]], packed=False))[0], together[0])
    found = gradients(trunk, together)
    assert any("classifier" in name for name in found)
    assert all(g.isfinite().all() for g in found.values())


def test_an_encoder_writes_nothing(tmp_path):
    section = Model(base=str(save_encoder(tmp_path / "bert")))
    assert is_encoder(AutoConfig.from_pretrained(section.base))
    assert not is_encoder(tiny_model("llama").config)
    with pytest.raises(UserError, match="reads in both directions and predicts no next token"):
        load_base(section, torch.device("cpu"), frozen=True)
    base = load_base(section, torch.device("cpu"), frozen=True, outputs=2)
    with pytest.raises(UserError, match="takes the padded layout alone"):
        Trunk(base, section.model_copy(update={"layout": "tree"}), None, outputs=2)


@pytest.mark.parametrize("family", [family for family in (*ATTENTION, *RECURRENT) if family not in HEADS])
def test_a_family_without_a_head_is_refused(family):
    with pytest.raises(UserError, match="transformers has no classification head for models of type"):
        with_head(tiny_model(family), 1, 0)
