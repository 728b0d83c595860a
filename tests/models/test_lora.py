"""LoRA on a trunk: the switch between adapters."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models.test_trunk import FORESTS
from models.tiny import tiny_model, tiny_trunk
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from align.data.trees import plant
from align.models.lora import Switch
from align.recipe.schema import Lora


def adapted(names: list[str]) -> nn.Module:
    """A model with adapters that each say something else."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@torch.no_grad()
def test_a_turn_is_what_pefts_own_switches_do():
    names = ["default", "critic"]
    ours, pefts, ids = adapted(names), adapted(names), torch.arange(3, 12)[None]
    pefts.load_state_dict(ours.state_dict())
    switch = Switch(ours)
    said = []
    for name in (*names, None, "default"):
        switch.turn(name)
        said.append(ours(input_ids=ids).logits)
        if name is None:
            with pefts.disable_adapter():
                assert torch.equal(said[-1], pefts(input_ids=ids).logits)
        else:
            pefts.set_adapter(name)
            assert torch.equal(said[-1], pefts(input_ids=ids).logits)
    assert not torch.allclose(said[0], said[1])
    assert not torch.allclose(said[0], said[2])


def test_an_adapter_that_was_added_later_needs_another_switch():
    model = adapted(["default"])
    switch = Switch(model)
    model.add_adapter("critic", model.peft_config["default"])
    with pytest.raises(AssertionError, match="critic was added after"):
        switch.turn("critic")
    Switch(model).turn("critic")


def test_a_turn_leaves_alone_what_trains():
    model = adapted(["default", "critic"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    switch = Switch(model)
    for name in ("critic", None, "default"):
        switch.turn(name)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("layers", [1, 4])
def test_a_turn_touches_no_layer(layers, monkeypatch):
    """One list, which all of peft's layers read: no walk over the model, no layer that is set."""
    trunk = tiny_trunk("llama", Lora(r=2), model=tiny_model("llama", num_hidden_layers=layers))
    adapters = [m for m in trunk.modules() if isinstance(m, BaseTunerLayer)]
    assert len(adapters) == 7 * layers
    seen = []
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("the model is walked"))
    monkeypatch.setattr(nn.Module, "__setattr__", lambda self, name, value: seen.append((self, name)))
    with trunk.acting(None):
        assert all(layer.active_adapters == [] for layer in adapters)
    assert all(layer.active_adapters == ["default"] for layer in adapters)
    assert {(id(module), name) for module, name in seen} <= {(id(trunk), "acts_as")}


def test_recomputed_layers_are_those_of_their_own_role():
    """Under gradient checkpointing the backward pass comes when another role acts."""

    def learnt(checkpointing: bool) -> dict[str, torch.Tensor]:
        trunk = tiny_trunk("llama", Lora(r=2))
        if checkpointing:
            again = {"context_fn": lambda: (nullcontext(), trunk.acting(trunk.acts_as))}
            trunk.plain.gradient_checkpointing_enable({"use_reentrant": False, **again})
        trunk.train()
        out = trunk(plant(FORESTS["pairs"])).sum()
        with trunk.acting(None):
            out.backward()
        return {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}

    plain, found = learnt(False), learnt(True)
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
