"""Fused rotary embeddings against transformers' own."""

from __future__ import annotations

import pytest
import torch
from models.tiny import FAMILIES, tiny_model
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from align.models.rotary import fuse_rotary, rotate


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
