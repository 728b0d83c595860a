"""The arithmetic of a plan beside what PyTorch really holds: tiny models, every live tensor counted."""

from __future__ import annotations

import pytest
import torch
from models.tiny import save_base, tiny_trunk, tree

from align.data.trees import plant
from align.models.memory import cached_token_bytes
from align.models.sampling.cache import KeyValues, Recorder
from align.recipe.schema import Lora, Model, Optim
from align.training.planning.activations import Live, Way, row
from align.training.planning.skeleton import Skeleton
from align.training.runs.state import adamw

CPU = Way("cpu", torch.float32)
TEXTS, LENGTH = 8, 64


def skeleton(folder, family, lora=None, **more):
    return Skeleton(Model(base=str(save_base(folder / family, family)), dtype="float32", **more), lora)


def kept(trunk, texts=TEXTS, length=LENGTH):
    """Bytes that a forward pass over so many texts keeps for its backward pass, every storage once."""
    forest = plant([tree(length, seed=i, share=1.0) for i in range(texts)])
    held, own = {}, {p.untyped_storage().data_ptr() for p in (*trunk.parameters(), *trunk.buffers())}
    groups = [m.group for m in trunk.modules() if getattr(m, "group", None) is not None]
    own |= {group.weight.untyped_storage().data_ptr() for group in groups}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states = trunk.hidden(forest, torch.arange(forest.tokens.numel()))
    assert states.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
def test_what_a_row_keeps_is_what_autograd_saves(tmp_path, family):
    planned = row(skeleton(tmp_path, family, Lora(r=4)), CPU, TEXTS * LENGTH, LENGTH).kept
    assert planned == pytest.approx(kept(tiny_trunk(family, Lora(r=4))), rel=0.08)


def test_training_the_trunk_itself(tmp_path):
    planned = row(skeleton(tmp_path, "llama"), CPU, TEXTS * LENGTH, LENGTH).kept
    assert planned == pytest.approx(kept(tiny_trunk("llama", None)), rel=0.08)


def test_checkpointing_keeps_a_layers_input_alone(tmp_path):
    whole = row(skeleton(tmp_path, "llama", Lora(r=4)), CPU, 512, 64)
    sparing = row(skeleton(tmp_path, "llama", Lora(r=4), gradient_checkpointing=True), CPU, 512, 64)
    states = 512 * 32 * 4
    assert 2 * states <= sparing.kept <= 5 * states < whole.kept  # two layers, and what comes before the first
    assert sparing.backward > whole.backward  # a layer is computed again meanwhile


def test_backward_holds_at_most_what_is_planned(tmp_path):
    trunk = tiny_trunk("llama", Lora(r=4))
    forest = plant([tree(LENGTH, seed=i, share=1.0) for i in range(TEXTS)])
    groups = {m.group for m in trunk.modules() if getattr(m, "group", None) is not None}
    own = [*trunk.parameters(), *trunk.buffers(), *(group.weight for group in groups)]
    with Live(own) as live:
        states = trunk.hidden(forest, torch.arange(forest.tokens.numel()))
        above, live.peak = torch.ones_like(states), live.now
        states.backward(above)
    planned = row(skeleton(tmp_path, "llama", Lora(r=4)), CPU, TEXTS * LENGTH, LENGTH)
    assert planned.kept + planned.backward == pytest.approx(live.peak, rel=0.12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_sizes_are_those_of_the_loaded_model(tmp_path, family):
    lora = Lora(r=4)
    sizes, trunk = skeleton(tmp_path, family, lora).sizes, tiny_trunk(family, lora)
    frozen = sum(p.numel() for p in trunk.parameters() if not p.requires_grad)
    assert sizes.weights == frozen
    assert sizes.adapter == sum(p.numel() for p in trunk.parameters() if p.requires_grad)
    assert sizes.layer == sum(p.numel() for name, p in trunk.layers[0].named_parameters() if "lora_" not in name)


def test_a_head_takes_the_place_of_the_projection(tmp_path):
    section = Model(base=str(save_base(tmp_path / "base", "qwen2")))
    language, scores = Skeleton(section, Lora()).sizes, Skeleton(section, Lora(), outputs=1).sizes
    assert language.weights - scores.weights == language.vocabulary * language.width


def test_keys_and_values_of_the_real_cache(tmp_path):
    section = skeleton(tmp_path, "llama", Lora(r=4))
    trunk, recorder = tiny_trunk("llama", None), Recorder()
    groups, size = section.sizes.groups, section.sizes.head
    for layer in range(section.sizes.depth):
        recorder.update(*torch.zeros(2, 1, groups, 12, size), layer)
    cache = KeyValues([12, 12], 3, torch.device("cpu"))
    cache.take(recorder, 0, [(0, 12), (0, 12)])
    real = sum(part.untyped_storage().nbytes() for pair in cache.layers.values() for part in pair)
    assert real == 2 * 15 * cached_token_bytes(section.text, trunk.dtype)
    assert real == 2 * 15 * 4 * section.sizes.cached


def test_moments_of_the_real_optimizer():
    trunk = tiny_trunk("llama", Lora(r=4))
    optimizer = adamw(trunk, Optim(), {})
    for p in trunk.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    trained = sum(p.numel() for p in trunk.parameters() if p.requires_grad)
    held = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert held == 8 * trained
