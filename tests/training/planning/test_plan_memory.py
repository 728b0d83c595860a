"""Which moments a plan has, and what comes together in them: recipes of a tiny model."""

from __future__ import annotations

import pytest
import torch
from models.tiny import save_base

from align import distill, ppo
from align.training.planning.devices import Device
from align.training.planning.memory import memory
from align.training.planning.parts import setting
from align.training.planning.work import work

DEVICE = Device("a CPU", "cpu", 8 * 10**9, torch.float32, 10.0**12, 10.0**11, None)
SERVER = {"engine": {"url": "http://127.0.0.1:1"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base") / "llama", "llama"))


def planned(module, base, processes=1, generation=None, shard="none", **own):
    """The setting of a recipe, and its plan."""
    stage = module.__name__.removeprefix("align.")
    recipe = {
        "stage": stage,
        "run": "run",
        "model": {"base": base},
        "data": {"train": [{"path": "prompts.jsonl"}], "max_length": 32},
        "batch": {"examples": 4},
        "train": {"steps": 1, "shard": shard},
        stage: {"generation": {"max_new": 8} | (generation or {})} | own,
    }
    at = setting(module.Recipe.model_validate(recipe), DEVICE, processes)
    return at, memory(at)


def moments(plan):
    return {moment.name: dict(moment.parts) for moment in plan.moments}


@pytest.mark.parametrize("shard", ["none", "layers"])
def test_what_a_server_draws_takes_no_memory_here(base, shard):
    """No keys and values, no whole trunk while it samples, and no work of this device."""
    rewards = [{"function": "align.training.rules:sentiment"}]
    (at, own), (there, served) = (
        planned(ppo, base, 2, generation, shard, rewards=rewards) for generation in ({}, SERVER)
    )
    assert "keys and values" in moments(own)["sampling"]
    assert ("the whole trunk, while it samples" in moments(own)["sampling"]) == (shard == "layers")
    assert moments(served) == {name: parts for name, parts in moments(own).items() if name != "sampling"}
    ours, theirs = work(at, own), work(there, served)
    assert (ours.episodes, ours.tokens) == (theirs.episodes, theirs.tokens)
    assert ours.flops > theirs.flops
    assert (ours.sent > theirs.sent) == (shard == "layers")


def test_answers_of_the_data_are_not_drawn(base):
    teacher = {"base": base}
    assert "sampling" in moments(planned(distill, base, teacher=teacher)[1])
    assert "sampling" not in moments(planned(distill, base, teacher=teacher, on_policy=0)[1])


def test_a_teacher_lies_over_the_processes_as_the_trunk_does(base):
    held = {}
    for shard in ("none", "layers"):
        parts = moments(planned(distill, base, 2, shard=shard, teacher={"base": base})[1])["update"]
        held[shard] = parts["trunk"], parts["the teacher"]
    trunk, teacher = held["none"]
    assert trunk == teacher
    assert held["layers"] == (trunk // 2, teacher // 2)


def test_loading_holds_the_file_and_what_is_made_of_it(base):
    """float32 in the file: its pages are the weights, of which shards are copies, or are cast and stay beside."""
    rewards = [{"function": "align.training.rules:sentiment"}]
    for dtype, shard, made in ((torch.float32, "none", 0), (torch.float32, "layers", 2), (torch.bfloat16, "layers", 2)):
        at, _ = planned(ppo, base, 2, shard=shard, rewards=rewards)
        at = at._replace(device=at.device._replace(dtype=dtype))
        weights = at.skeleton.sizes.weights
        assert moments(memory(at))["loading"] == {"the file": 4 * weights, "weights": made * weights}


def test_ddp_sends_weights_round_as_it_begins(base):
    rewards = [{"function": "align.training.rules:sentiment"}]
    parts = {
        (processes, shard): moments(planned(ppo, base, processes, shard=shard, rewards=rewards)[1])
        for processes, shard in ((1, "none"), (2, "none"), (2, "layers"))
    }
    assert [at for at, found in parts.items() if "DDP's beginning" in found] == [(2, "none")]
    whole = parts[2, "none"]["DDP's beginning"]
    assert whole["weights that are sent round"] == whole["trunk"], "of so small a trunk, all"
