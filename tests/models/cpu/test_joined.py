"""Products that are joined and prepared give the numbers of those that are not."""

from __future__ import annotations

import pytest
import torch
from models.test_trunk import FORESTS, close
from models.tiny import gradients, stir, tiny_model, tiny_trunk
from peft.tuners import lora
from torch import nn

from align.data.trees import plant
from align.models import acceleration
from align.models.cpu.fixed import fixed_products, prepare_products, sampling_bytes
from align.models.cpu.joined import Joined
from align.models.cpu.packed import COPIES, Fixed, arranges
from align.models.cpu.products import LoraLinear
from align.models.lora import lora_config
from align.models.trunk import Trunk
from align.recipe.schema import Lora
from align.training.planning import parts

NEEDS = pytest.mark.skipif(
    not arranges(torch.empty(1, 1, dtype=torch.bfloat16)), reason="this CPU does not multiply bfloat16"
)


def groups(model: nn.Module) -> list[Joined]:
    found = {id(m.group): m.group for m in model.modules() if getattr(m, "group", None) is not None}
    return list(found.values())


@NEEDS
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases, and with
def test_prepared_products_give_the_same_numbers(family):
    """While nothing trains, and for a training; with the adapter, and without."""
    trunk = tiny_trunk(family, Lora(r=4, alpha=8), "tree", model=tiny_model(family).bfloat16())
    for name, p in trunk.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    forest = plant(FORESTS["pairs"])

    def numbers() -> list[torch.Tensor]:
        with torch.no_grad(), trunk.acting(None):
            bare = trunk.states(forest).float()
        with torch.no_grad():
            return [bare, trunk.states(forest).float()]

    plain = numbers()
    assert (plain[0] - plain[1]).norm() > 0.3 * plain[1].norm()
    with fixed_products(trunk, 64):
        assert {type(group.fixed) for group in groups(trunk)} == {Fixed}
        with torch.no_grad():
            fixed = trunk.states(forest).float()
    assert not any(group.fixed for group in groups(trunk))
    prepare_products(trunk)
    assert all(group.ready for group in groups(trunk))
    with trunk.acting(None):  # a gradient goes through the frozen weights themselves
        embedded = trunk.decoder.get_input_embeddings()(forest.tokens).detach().requires_grad_()
        trunk.layers[0].mlp(embedded).float().square().sum().backward()
    assert embedded.grad.abs().sum() > 0
    for found, known in zip([fixed, *numbers()], [plain[1], *plain], strict=True):
        assert (found - known).norm() <= 0.02 * known.norm()


@pytest.mark.parametrize("lora", [Lora(r=4, targets=["q_proj", "down_proj"]), None], ids=["some layers", "none"])
def test_layers_without_an_adapter_are_prepared_too(lora, monkeypatch):
    """While nothing trains, in their own dtype, for few rows; not the head. The copies are what multiplies."""
    trunk = stir(tiny_trunk("qwen2", lora, "tree")).requires_grad_(False)
    forest, x = plant(FORESTS["pairs"]), torch.randn(3, 32)
    layer = trunk.layers[0].mlp.gate_proj
    with torch.no_grad():
        known = trunk.states(forest)
    with fixed_products(trunk, 16):
        held = [
            name for name, module in trunk.named_modules() if "forward" in vars(module) and type(module) is nn.Linear
        ]
        assert len(held) == len(trunk.layers) * (7 - (2 if lora else 0))
        assert not any("head" in name for name in held)
        with torch.no_grad():
            torch.testing.assert_close(trunk.states(forest), known, rtol=1e-5, atol=1e-5)
            before, kept = layer(x), layer.weight.clone()
            layer.weight.zero_()
            assert torch.equal(layer(x), before)
            layer.weight.copy_(kept)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
        asked = x.requires_grad_()
        assert torch.autograd.grad(layer(asked).sum(), asked)[0].abs().sum() > 0
    assert "forward" not in vars(layer)
    with fixed_products(trunk, 2048):
        assert "forward" not in vars(layer)
    monkeypatch.setattr("align.models.cpu.fixed.COPIES", 0)
    with fixed_products(trunk, 16):
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("lora", [Lora(r=4, alpha=8), Lora(r=4, dropout=0.5)], ids=["plain", "dropout"])
def test_float32_products_with_an_adapter_are_made_of_copies(lora):
    """Joined ones and others, with the adapter and under another acting; dropout is for training alone."""
    trunk = stir(tiny_trunk("qwen2", lora, "tree")).eval()
    forest, weights = plant(FORESTS["pairs"]), [group.weight for group in groups(trunk)]
    weights += [layer.mlp.down_proj.get_base_layer().weight for layer in trunk.layers]
    for acts in ("default", None):
        with torch.no_grad(), trunk.acting(acts):
            known = trunk.states(forest)
            with fixed_products(trunk, 16):
                kept = [weight.detach().clone() for weight in weights]
                for weight in weights:
                    weight.data.zero_()
                found = trunk.states(forest)
                for weight, before in zip(weights, kept, strict=True):
                    weight.data.copy_(before)
            torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)


def test_bytes_of_copies_are_known_before(monkeypatch):
    """Of layers, with adapters or without, and of the head; each kind up to a limit of its own."""
    trunk = tiny_trunk("qwen2", Lora(r=4, targets=["q_proj", "down_proj"]), "tree")
    head = trunk.head.weight.nbytes
    with fixed_products(trunk, 16):
        layers = sum(part.get_base_layer().weight.nbytes for part in trunk.modules() if isinstance(part, LoraLinear))
        layers += sum(m.weight.nbytes for m in trunk.modules() if type(m) is nn.Linear and "forward" in vars(m))
    assert sampling_bytes(trunk) == layers + head
    for module, rest in (("fixed", head), ("packed", 0)):
        monkeypatch.setattr(f"align.models.cpu.{module}.COPIES", 0)
        assert sampling_bytes(trunk) == rest
    assert parts.COPIES == 2**31 == COPIES


@pytest.mark.parametrize("bare", [False, True])
def test_who_keeps_one_part_does_not_keep_the_others(bare):
    """Values stay for attention's backward pass and in a cache; query and key are turned first, into new tensors."""
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8), "tree")
    attention, x = trunk.layers[0].self_attn, torch.randn(1, 6, 32)
    with trunk.acting(None if bare else "default"):
        parts = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert attention.q_proj.group is attention.v_proj.group is not None
    assert [part.untyped_storage().nbytes() for part in parts] == [6 * width * 4 for width in (32, 16, 16)]


def with_critic() -> Trunk:
    """Of an adapter on queries alone, and one on all that a role of PPO has."""
    trunk = tiny_trunk("llama", Lora(r=4, targets=["q_proj"]), "tree")
    trunk.causal.add_adapter("critic", lora_config(Lora(r=2, alpha=4), trunk.plain))
    trunk.take_in()
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return stir(trunk)


def test_adapters_that_were_added_later_are_joined_too(monkeypatch):
    """A layer that the first adapter left alone becomes one of ours with the next."""
    assert not groups(tiny_trunk("llama", Lora(r=4, targets=["q_proj"]), "tree"))
    trunk = with_critic()
    assert {type(m) for m in trunk.modules() if isinstance(m, lora.LoraLayer)} == {LoraLinear}
    assert len(groups(trunk)) == 2 * len(trunk.layers)
    monkeypatch.setattr(acceleration, "FOLDERS", {})
    plain = with_critic()
    assert {type(m) for m in plain.modules() if isinstance(m, lora.LoraLayer)} == {lora.Linear}
    plain.load_state_dict(trunk.state_dict())
    forest, said = plant(FORESTS["pairs"]), []
    for role in ("default", "critic", None):
        with trunk.acting(role), plain.acting(role):
            said.append(trunk(forest))
            torch.testing.assert_close(said[-1], plain(forest), rtol=1e-5, atol=1e-5)
            if role:
                ours, pefts = gradients(trunk, said[-1]), gradients(plain, plain(forest))
                assert {name for name in ours if role in name} == {name for name in pefts if role in name} != set()
                close(ours, pefts, 1e-4)
    assert (said[0] - said[1]).abs().max() > 0.01
