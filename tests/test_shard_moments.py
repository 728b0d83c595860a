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
from sharding import LAYERS, Job, alone, assert_same, make_wide, place, together
from world import align

from align import reward

STEPS = {"train": {"steps": 2, "eval_every": None, "save_every": 1}}
# What a process with shards may hold after an update of the bytes of one without.
MOST = 0.45


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory):
    return make_wide(world, tmp_path_factory.mktemp("wide"))


def every_job(world, wide: str, here: Path) -> dict[str, Job]:
    """A LoRA that counts beside its trunk: by itself, with a head, and as an actor and a faster critic."""
    model, few = {"base": wide, "dtype": "float32"}, {"examples": 2, "row_tokens": 128}
    common: dict[str, Any] = {"model": model, "batch": few, "optim": {"learning_rate": 0.0005, "warmup": 0}} | STEPS
    rewards = [{"function": "ppo_start:watching"}]
    own = {"rewards": rewards, "critic_learning_rate": 0.001}
    roles = recipe_of(world, Start(Path(wide), Path()), place(here, "ppo"), ppo=own, lora={"r": 16}, **common)
    return {
        "sft": Job("sft", world.recipe(place(here, "sft"), lora={"r": 32}, **common)),
        "reward": Job("reward", world.preferences(place(here, "reward"), reward, lora={"r": 32}, **common)),
        "ppo": Job("ppo", roles),
    }


def checkpoint(run: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / f"{part}.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_has_its_part_and_the_checkpoint_all(world, wide, here, monkeypatch):
    """New, gone on with, and started from another run; in shards, and from shards on one process."""
    monkeypatch.setattr("world.WAIT", 400)
    jobs, turns = every_job(world, wide, here), []
    known = {name: alone(job) for name, job in jobs.items()}
    for name, job in jobs.items():
        begun = job._replace(run="begun")  # by one process; two go on
        shutil.copytree(known[name], begun.folder)
        for later in ("checkpoints/step-000002", "final"):
            shutil.rmtree(begun.folder / later)
        start = f"train.start_from={known[name] / 'checkpoints' / 'step-000002'}"
        turns += [job, job.copied(), begun, job._replace(run="started", words=(LAYERS, start))]
    held = together(here, turns)
    for number, (name, job) in enumerate(jobs.items()):
        shards, copies, again, started = held[4 * number : 4 * number + 4]
        print(name, [x / copies for x in (shards, again, started)])
        assert max(shards, again, started) <= MOST * copies, (name, held)
        for run in ("two", "begun"):
            assert_same(job.recipe.parent / run, known[name])
        for step in (1, 2):
            for part in ("model", "optimizer"):
                ours, theirs = (checkpoint(run, step, part) for run in (job.folder, known[name]))
                assert ours.keys() == theirs.keys()
                for key, tensor in theirs.items():
                    assert torch.dist(ours[key], tensor) <= 1e-2 * tensor.norm(), (name, step, key)
        other = here / name / "other"
        stage = importlib.import_module(f"align.{name}")
        told = align(job.recipe, f"run={other}", turns[4 * number + 3].words[1], stage=stage)
        assert told.status == 0, told.err
        assert_same(job.recipe.parent / "started", other)
