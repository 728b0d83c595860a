"""Fused rotary embeddings against transformers' own."""

from __future__ import annotations

import pytest
import torch
from models.tiny import FAMILIES, VOCABULARY, tiny_model, tiny_trunk, tree
from transformers import AutoModelForCausalLM, NemotronConfig, Olmo2Config
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from align.data.trees import plant
from align.models.cpu import rotary
from align.models.cpu.rotary import fuse_rotary, rotate
from align.recipe.schema import Lora


def given(dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, cos and sin, none of which repeats itself."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 7, 8), (2, 2, 7, 8), (2, 7, 8), (2, 7, 8))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def test_equals_transformers_and_its_gradient():
    q, k, cos, sin = given(torch.float64)
    for ours, stock in zip(rotate(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda *pair: rotate(*pair, cos, sin), (q.requires_grad_(), k.requires_grad_()))


def test_halves_by_hand():
    """One pair of numbers turned by a quarter: (1, 2) becomes (-2, 1)."""
    x, zero, one = torch.tensor([[[[1.0, 2.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert [part.flatten().tolist() for part in rotate(x, 3 * x, zero, one)] == [[-2, 1], [-6, 3]]


def test_other_ways_to_turn_are_left_alone(monkeypatch):
    """GLM turns neighbours, not halves."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_glm.apply_rotary_pos_emb)
    fuse_rotary(model)
    assert "forward" not in vars(attention)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_models_say_the_same_and_others_are_not_touched(family):
    stock, model = tiny_model(family), tiny_model(family)
    fuse_rotary(model)
    ids = torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
    fused = [module for module in model.modules() if "forward" in vars(module)]
    if family == "llama":
        assert len(fused) == model.config.num_hidden_layers
    for module in fused:
        assert type(module).forward.__globals__["apply_rotary_pos_emb"] is not rotate


@pytest.mark.parametrize("config", [NemotronConfig, Olmo2Config], ids=["a part of each head", "turned in float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rotate_does_not_do_is_left_to_the_model(config, dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    ids = torch.arange(5, 25).view(2, 10)
    expected = model(ids).logits
    fuse_rotary(model)
    assert "forward" in vars(model.model.layers[0].self_attn)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_trunk_turns_with_it(monkeypatch):
    calls, ours = [], rotary.rotate
    monkeypatch.setattr(rotary, "rotate", lambda *args: calls.append(args) or ours(*args))
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    calls.clear()
    trunk(plant([tree(9)]))
    assert len(calls) == trunk.plain.config.num_hidden_layers
