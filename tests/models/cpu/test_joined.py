"""Products that are joined and prepared give the numbers of those that are not."""

from __future__ import annotations

import pytest
import torch
from models.test_trunk import FORESTS
from models.tiny import tiny_model, tiny_trunk
from torch import nn

from align.data.trees import plant
from align.models.cpu.joined import Joined, fixed_products, prepare_products
from align.models.cpu.packed import Fixed, arranges
from align.recipe.schema import Lora

pytestmark = pytest.mark.skipif(
    not arranges(torch.empty(1, 1, dtype=torch.bfloat16)), reason="this CPU does not multiply bfloat16"
)


def groups(model: nn.Module) -> list[Joined]:
    found = {id(m.group): m.group for m in model.modules() if getattr(m, "group", None) is not None}
    return list(found.values())


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
