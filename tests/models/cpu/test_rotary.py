"""Attention modules with rotary embeddings in one step, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from models.tiny import FAMILIES, VOCABULARY, tiny_model, tiny_trunk, tree
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

from align.data.trees import plant
from align.models.cpu import rotary
from align.models.cpu.fused import fuse
from align.recipe.schema import Lora

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
TURN_HALVES = {"llama", "qwen2", "qwen3", "mistral-window", "gemma", "gemma2", "gemma3", "granite"}


def made(kind: str, dtype: torch.dtype = torch.float32, **more: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model, and the same to be fused."""
    config = AutoConfig.for_model(kind, **SIZES, **more)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(config).to(dtype).eval())
    return tuple(models)


def turning(model: PreTrainedModel) -> list[bool]:
    """Of each layer: whether it turns in one step."""
    forwards = [vars(layer.self_attn).get("forward") for layer in model.model.layers]
    return [getattr(forward, "__func__", None) is rotary.attention_forward for forward in forwards]


def test_equals_transformers_and_its_gradient():
    draw = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(2, 3, 7, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    cos, sin = cos[:, 0], sin[:, 0]
    ours = rotary._Turned.apply(x, cos[:, None], sin[:, None])
    torch.testing.assert_close(ours, modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0], rtol=1e-14, atol=1e-14)
    turned = lambda x: rotary._Turned.apply(x, cos[:, None], sin[:, None])  # noqa: E731
    assert torch.autograd.gradcheck(turned, x.requires_grad_())


def test_by_hand():
    """One pair of numbers turned by a quarter: (1, 2) becomes (-2, 1)."""
    x, zero, one = torch.tensor([[[[1.0, 2.0]]]]), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    assert rotary._Turned.apply(x, zero, one).flatten().tolist() == [-2, 1]


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"mamba", "lfm2"}))
def test_every_family_says_the_same(family):
    stock, model = tiny_model(family), tiny_model(family)
    fuse(model)
    ids = torch.arange(5, 25).view(2, 10)
    if hasattr(model, "model"):
        assert {*turning(model)} == {family in TURN_HALVES}
    found = [one(ids).logits for one in (model, stock)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in (ids[:, :6], ids[:, 6:])]
    torch.testing.assert_close(torch.cat(parts, 1), found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "more", "turns"),
    [
        ("glm", {"partial_rotary_factor": 1.0}, [False] * 4),  # it turns neighbours, not halves
        ("nemotron", {}, [True] * 4),  # half of each head: when it is called, not when it is tried
        ("olmo2", {}, [False] * 4),  # it norms all heads as one
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, [True, True, False, True]),
    ],
)
def test_what_is_done_otherwise_is_left_alone(kind, more, turns, dtype):
    stock, model = made(kind, dtype, **more)
    fuse(model)
    assert turning(model) == turns
    ids = torch.arange(5, 25).view(2, 10)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change", ["settings", "output", "gradient", "fault"])
def test_a_forward_that_does_otherwise_is_left_alone(change, monkeypatch):
    own = modeling_llama.LlamaAttention.forward

    def forward(self, hidden_states, **more):
        if change == "settings":
            return own(self, hidden_states, sliding_window=3, **more)
        if change == "fault":
            return more["nothing of this name"]
        given = hidden_states.detach() + 0 * hidden_states if change == "gradient" else hidden_states
        found, weights = own(self, given, **more)
        return 2 * found if change == "output" else found, weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    _, model = made("llama")
    fuse(model)
    assert turning(model) == [False] * 4


def test_quantised_weights_are_left_alone():
    _, model = made("llama")
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    fuse(model)
    assert turning(model) == [True, False, True, True]


def test_a_trunk_turns_with_it(monkeypatch):
    calls, ours = [], rotary._Turned.apply
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    monkeypatch.setattr(rotary._Turned, "apply", lambda *args: calls.append(args) or ours(*args))
    trunk(plant([tree(9)]))
    assert len(calls) == 2 * trunk.plain.config.num_hidden_layers
