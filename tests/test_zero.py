"""DeepSpeed's ZeRO: losses, weights and checkpoints as with one process; what it cannot do is refused by name."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import pytest
import torch
from forks import PRELOADED
from test_processes import free_port
from world import Child, align, lines, metrics, weights

from align import dpo, ppo, reward, sft

deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
if find_spec("deepspeed"):
    os.environ["DS_ACCELERATOR"] = "cpu"  # before the children's server imports it
    PRELOADED.append("deepspeed")
STAGES = {"sft": sft, "dpo": dpo, "reward": reward}


def pair(here, *argv, zero, stage=sft, more=()):
    """Two processes as accelerate's launcher starts them for DeepSpeed."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero), "OMP_NUM_THREADS": "1"}
    if zero == 3 and not more:  # weights as small as these would stay whole
        config = here / "zero3.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
        more = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    shared |= {"DS_ACCELERATOR": "cpu", **dict(more)}
    ranks = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    first, second = [Child(here, *argv, stage=stage, rank=rank) for rank in ranks]
    return first.wait(), second.wait()


def assert_same(run, other, tolerance=1e-5):
    """Every figure of metrics.jsonl, and the trained weights."""
    ours, theirs = metrics(run), metrics(other)
    assert [set(record) for record in ours] == [set(record) for record in theirs]
    for record, reference in zip(ours, theirs, strict=True):
        numbers = {n: x for n, x in record.items() if isinstance(x, float | int)}
        assert numbers == pytest.approx({n: reference[n] for n in numbers}, rel=tolerance, abs=tolerance)
    mine = weights(run)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-5)


RUNS = [
    ("sft", 2, {}), ("sft", 3, {}), ("sft", 3, {"lora": None}), ("dpo", 3, {}), ("dpo", 3, {"dpo": {"loss": "kto"}}),
    ("dpo", 2, {"lora": None}), ("reward", 2, {}), ("reward", 3, {}),
]  # fmt: skip


@deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "sections"),
    RUNS,
    ids=[f"{s}{z}{'-full' * ('lora' in m)}{'-kto' * ('dpo' in m)}" for s, z, m in RUNS],
)
def test_as_with_one_process_and_gone_on_with(stage, zero, sections, world, here):
    module, path = STAGES[stage], here / "recipe.yaml"
    optim = {"learning_rate": 0.002} if "lora" in sections else {}
    write = world.recipe if stage == "sft" else lambda path, **given: world.preferences(path, module, **given)
    given = {
        "optim": {"learning_rate": 0.01, "warmup": 2} | optim,
        "train": {"steps": 6, "eval_every": 3, "save_every": 2},
        "log": {"trackers": [], "samples": ["Peru?"], "sample_tokens": 4} if stage == "sft" else {"trackers": []},
    }
    recipe = write(path, **given, **sections)
    assert align(recipe, stage=module).status == 0
    first, second = pair(here, recipe, f"run={here / 'two'}", zero=zero, stage=module)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert f"DeepSpeed ZeRO-{zero}" in first.out
    assert_same(here / "two", here / "run")
    if stage == "sft":
        assert lines(here / "two" / "samples.jsonl") == lines(here / "run" / "samples.jsonl")
    checkpoints = here / "two" / "checkpoints"
    for step in (4, 6):  # a checkpoint of two processes goes on with one, and the other way round
        ours, theirs = (p / "checkpoints" / f"step-00000{step}" for p in (here / "two", here / "run"))
        assert json.loads((ours / "state.json").read_text())["step"] == step
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    assert checkpoints.is_dir()
    longer = [recipe, "--extend", "train.steps=9"]
    assert align(*longer, stage=module).status == 0
    first, _ = pair(here, *longer, f"run={here / 'two'}", zero=zero, stage=module)
    assert first.status == 0, first.err
    assert "(step 6 of 9)" in first.out
    assert_same(here / "two", here / "run")


@deepspeed
def test_refused_by_name(world, here):
    """What it cannot run, and what its configuration may not ask for, all at once."""
    recipe = world.recipe(here / "recipe.yaml")
    (here / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": True}})
    )
    told, _ = pair(here, recipe, zero=3, more={"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(here / "ds.json")})
    assert told.status == 2
    assert "bf16.enabled: leave it out, model.dtype decides" in told.err
    assert "offload_param" in told.err
    assert "Traceback" not in told.err
    rewards = [{"function": "ppo_start:wordy"}]
    recipe = world.recipe(here / "ppo.yaml", stage="ppo", ppo={"rewards": rewards})
    told, _ = pair(here, recipe, zero=2, stage=ppo)
    assert told.status == 2
    assert "DeepSpeed cannot run align.ppo" in told.err
    assert "train.shard=layers" in told.err


def test_without_deepspeed(world, here, monkeypatch):
    """A launcher's configuration that asks for it says what to install."""
    if find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    told = align(world.recipe(here / "recipe.yaml"))
    assert (told.status, told.err.count("\n")) == (2, 1)
    assert "pip install deepspeed" in told.err
