"""A faster attention is taken where it has the plain one's values and gradients, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from models.test_trunk import FORESTS
from models.tiny import tiny_trunk

from align.data.trees import plant
from align.models import acceleration
from align.models.attention import dense_attention
from align.models.layout import faster_attention
from align.recipe.schema import Lora


def same(query, key, value, mask, scale, window, softcap):
    return dense_attention(query, key, value, mask, scale, window, softcap) * 1


def other_values(*given):
    return dense_attention(*given) * 1.01


def other_gradients(query, key, value, *more):
    return dense_attention(query, key.detach() + 0 * key, value, *more)


def without_a_window(query, key, value, mask, scale, window, softcap):
    return dense_attention(query, key, value, mask, scale, None, softcap)


def without_a_cap(query, key, value, mask, scale, window, softcap):
    return dense_attention(query, key, value, mask, scale, window, None)


def failing(*given):
    raise NotImplementedError("no compiler")


@pytest.mark.parametrize(
    ("faster", "why"),
    [
        (same, ""),
        (other_values, "the numbers of the faster way differ"),
        (other_gradients, "the numbers of the faster way differ"),
        (without_a_window, "the numbers of the faster way differ"),
        (without_a_cap, "the numbers of the faster way differ"),
        (failing, "the faster way fails (no compiler)"),
    ],
)
def test_what_differs_or_fails_is_left_out(faster, why):
    """The model has a window in one layer, and a cap in both."""
    trunk = tiny_trunk("gemma2", Lora(r=4, dropout=0.5))
    trunk.train()
    drawn = torch.random.get_rng_state()
    assert faster_attention(trunk, faster) == (dense_attention if why else faster, why)
    assert trunk.training
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_the_user_is_told_of_what_is_left_out(monkeypatch):
    """And the numbers are those of the plain path."""
    forest, trunk = plant(FORESTS["pairs"]), tiny_trunk("llama", Lora(r=4))
    monkeypatch.setattr(acceleration, "attention", lambda _device: failing)
    fallen = tiny_trunk("llama", Lora(r=4))
    fallen.load_state_dict(trunk.state_dict())
    assert "attention over dense scores, for the faster way fails (no compiler)" in fallen.remarks
    torch.testing.assert_close(fallen(forest), trunk(forest), rtol=1e-5, atol=1e-5)


def test_without_a_folder_nothing_is_adopted(monkeypatch):
    monkeypatch.setattr(acceleration, "FOLDERS", {})
    offer = acceleration.offer(torch.device("cpu"))
    assert offer == acceleration.Offer()
    trunk = tiny_trunk("llama", Lora(r=4))
    assert trunk.forest_attention is dense_attention
    assert {type(m).__module__.split(".")[0] for m in trunk.causal.modules()} <= {"torch", "peft", "transformers"}
    assert not any("forward" in vars(m) for m in trunk.layers.modules())
