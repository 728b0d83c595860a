"""Adapters that stay beside frozen layers: the numbers of merged ones, under every role. No quantisation is needed."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models.test_base import CPU, FOREST, saved, trunk_on
from models.tiny import gradients, save_base, stir
from torch import nn

from align.models.base import Base, load_base, load_tokenizer
from align.models.checkpoints.adapters import Merged, merge
from align.models.checkpoints.results import read_result
from align.models.kept import Kept, cast
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

LORA = Lora(r=3, alpha=6)


def linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, an adapter on it, and one of another rank and scale on both."""
    folder = tmp_path_factory.mktemp("chain")
    base = save_base(folder / "base")
    first = saved(stir(trunk_on(base)), folder / "first")
    second = saved(stir(trunk_on(base, Lora(r=2, alpha=3), adapter=str(first)), 2), folder / "second")
    return base, first, second


def kept_trunk(base: Path, *adapters: Path, lora: Lora = LORA, dtype=torch.float32, **settings) -> Trunk:
    """A trunk of numbers that keeps what it could merge."""
    section = Model(base=str(base), dtype="float32", **settings)
    plain = load_base(section, CPU, frozen=True)
    trunk = Merged(plain.model, plain.links, plain.fingerprint)
    for path in adapters:
        trunk = merge(trunk, read_result(str(path), "model.adapter"), str(path), stays=linear)
    cast(trunk.model, dtype)
    loaded = Base(trunk.model, load_tokenizer(section), trunk.fingerprint, str(base), str(base), trunk.links)
    return Trunk(loaded, section, lora)


def test_kept_adapters_are_merged_ones_to_float_tolerance(chain):
    """Values, the bare trunk's among them, and gradients; fingerprint and links are the same."""
    base, first, second = chain
    kept, merged = kept_trunk(base, first, second), trunk_on(base, LORA, adapter=[str(first), str(second)])
    assert (kept.fingerprint, kept.links) == (merged.fingerprint, merged.links)
    assert not any(isinstance(module, Kept) for module in merged.modules())
    for trunk in kept, merged:
        stir(trunk, 3)
    values = kept(FOREST), merged(FOREST)
    torch.testing.assert_close(*values, rtol=1e-5, atol=2e-5)
    ours, theirs = (gradients(trunk, out) for trunk, out in zip((kept, merged), values, strict=True))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), kept.acting(None) as one, merged.acting(None) as other:
        bare = one(FOREST)
        torch.testing.assert_close(bare, other(FOREST), rtol=1e-5, atol=2e-5)
    assert (bare - kept(FOREST)).abs().max() > 0.01
    assert (bare - trunk_on(base)(FOREST)).abs().max() > 0.01


def test_recomputing_a_layer_keeps_them(chain):
    base, first, second = chain
    usual, again = (stir(kept_trunk(base, first, second, gradient_checkpointing=on)) for on in (False, True))
    found = [gradients(trunk.train(), trunk(FOREST)) for trunk in (usual, again)]
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


def test_nothing_of_them_trains_or_is_saved_again(chain, tmp_path):
    base, first, _ = chain
    kept = stir(kept_trunk(base, first))
    assert not [name for name, _ in kept.named_parameters() if "kept" in name]
    final = saved(kept, tmp_path / "final")
    result = read_result(str(final), "model.adapter")
    assert not [name for name in result.weights if "kept" in name]
    assert [link.name for link in result.about.trunk] == [str(base), str(first)]
    again = trunk_on(base, Lora(r=1), adapter=[str(first), str(final)])  # which stands on the same trunk, merged
    with torch.no_grad():
        torch.testing.assert_close(again(FOREST), kept(FOREST), rtol=1e-5, atol=2e-5)


def test_they_have_the_trunks_dtype_and_go_with_a_copy(chain):
    base, first, _ = chain
    kept = kept_trunk(base, first, dtype=torch.bfloat16)
    assert {t.dtype for module in kept.modules() if isinstance(module, Kept) for t in module.buffers()} == {
        torch.bfloat16
    }
    exact = kept_trunk(base, first)
    with torch.no_grad():
        assert 0 < (kept(FOREST) - exact(FOREST)).abs().median() < 0.3
    layer = next(module for module in kept.modules() if hasattr(module, "kept"))
    copy, x = deepcopy(layer), torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert torch.equal(copy(x), layer(x))
    layer.kept.b.zero_()
    assert not torch.equal(copy(x), layer(x))
