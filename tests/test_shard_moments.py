"""With `train.shard: layers` each process keeps AdamW's moments of its part of what a LoRA trains, and steps that."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_start import Start, recipe_of
from safetensors.torch import load_file
from sharding import LAYERS, Job, alone, assert_same, make_wide, together
from world import align

from align import reward

STEPS = {"train": {"steps": 2, "eval_every": None, "save_every": 1}}
# What a process with shards may hold after an update of the bytes of one without.
MOST = 0.45


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory):
    return make_wide(world, tmp_path_factory.mktemp("wide"))


def job_of(stage: str, world, wide: str, here: Path) -> Job:
    """A LoRA that counts beside its trunk: by itself, with a head, or as an actor and a faster critic."""
    model, few = {"base": wide, "dtype": "float32"}, {"examples": 2, "row_tokens": 128}
    common: dict[str, Any] = {"model": model, "batch": few, "optim": {"learning_rate": 0.0005, "warmup": 0}} | STEPS
    path = here / "recipe.yaml"
    match stage:
        case "sft":
            return Job(stage, world.recipe(path, lora={"r": 32}, **common))
        case "reward":
            return Job(stage, world.preferences(path, reward, lora={"r": 32}, **common))
    own = {"rewards": [{"function": "ppo_start:watching"}], "critic_learning_rate": 0.001}
    return Job(stage, recipe_of(world, Start(Path(wide), Path()), path, ppo=own, lora={"r": 16}, **common))


def checkpoint(run: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{part}.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_process_has_its_part_and_the_checkpoint_all(world, wide, here, monkeypatch, stage):
    """Where a run is new, goes on from one process, and starts from another run's weights and moments."""
    monkeypatch.setattr("world.WAIT", 400)
    job = job_of(stage, world, wide, here)
    known, begun, started, other = alone(job), job._replace(run="begun"), job._replace(run="started"), here / "other"
    shutil.copytree(known, begun.folder)
    for later in ("checkpoints/step-000002", "final"):
        shutil.rmtree(begun.folder / later)
    start = f"train.start_from={known / 'checkpoints' / 'step-000002'}"
    copies, *shards = together(here, [job.copied(), job, begun, started._replace(words=(LAYERS, start))])
    assert max(shards) <= MOST * copies, (shards, copies)
    for step in (1, 2):
        for part in ("model", "optimizer"):
            ours, theirs = (checkpoint(run, step, part) for run in (job.folder, known))
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert torch.dist(ours[key], tensor) <= 1e-3 * tensor.norm(), (step, key)
    assert_same(job.folder, known)
    assert_same(begun.folder, known)
    told = align(job.recipe, f"run={other}", start, stage=importlib.import_module(f"align.{stage}"))
    assert told.status == 0, told.err
    assert_same(started.folder, other)
