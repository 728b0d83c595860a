"""A whole pipeline killed in every kind of stage: the same command goes on, and ends with the same compare.json."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from often import REPEATS, repeated
from test_pipeline import written
from world import Child, align

from align import pipeline

STUDY = Path("runs/both")
PART = {"path": "pairs.jsonl", "limit": 8}
ONE = {"train": [PART]}
ASKED = {"samples": 2, "generation": {"max_new": 6}}
GOLD, PROXY = {"function": "ppo_start:wordy", "name": "gold"}, {"adapter": "${reward}", "name": "proxy"}
FOUR = {"examples": 4}
AFTER_SFT = {"model": {"adapter": "${sft}"}, "data": ONE}
JUDGED = {"stage": "evaluate", "evaluate": ASKED | {"scores": [GOLD, PROXY]}, **AFTER_SFT}
STAGES = {
    "sft": {"stage": "sft", "batch": FOUR, "data": {"train": [{"path": "talks.jsonl"}]}},
    "reward": {"stage": "reward", "batch": FOUR, **AFTER_SFT},
    "dpo": {"stage": "dpo", "batch": FOUR, "sweep": {"dpo.beta": [0.1]}, **AFTER_SFT},
    "ppo": {"stage": "ppo", "batch": FOUR, "ppo": ASKED | {"rewards": [{"adapter": "${reward}"}]}, **AFTER_SFT},
    "start": JUDGED,
    "dpo_said": JUDGED | {"each": "dpo", "policy": "${dpo}"},
    "ppo_said": JUDGED | {"policy": "${ppo}"},
    "compared": {
        "stage": "compare",
        "compare": {
            "baseline": "${start}",
            "runs": [{"path": "${dpo_said}", "group": "dpo"}, {"path": "${ppo_said}", "group": "ppo"}],
            "proxy": "proxy",
            "resamples": 200,
        },
    },
}
SHARED = {
    "model": {"base": "base", "dtype": "float32"},
    "lora": {"r": 4, "alpha": 8},
    "batch": {"row_tokens": 384},
    "optim": {"learning_rate": 0.02},
    "train": {"steps": 3, "eval_every": 1, "save_every": 1},
    "log": {"trackers": []},
}


@pytest.fixture(scope="module")
def study(world, cache, tmp_path_factory):
    """The folder of a pipeline that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        patch.chdir(tmp_path_factory.mktemp("study"))
        laid_out(world)
        told = align("study.yaml", stage=pipeline)
        assert told.status == 0, told.out + told.err
        yield Path.cwd()


def laid_out(world) -> None:
    """The files of the study, in this folder, so that its paths are the same wherever it stands."""
    for path in (world.talks, world.pairs):
        shutil.copy(path, path.name)
    Path("base").symlink_to(world.base)
    written(STAGES, SHARED, "study.yaml")


pytestmark = repeated
MOMENTS = (
    "sft/checkpoints/step-000001",
    "ppo/checkpoints/step-000001",
    "dpo_said-beta=0.1/environment.json",  # in the middle of what it writes
    "compared/recipe.yaml",
    "sft/final",  # at its end, which is not noted yet
    "reward/metrics.jsonl",
    "dpo-beta=0.1/checkpoints/step-000002",
    "start/recipe.yaml",  # nothing is evaluated yet
    "compared/compare.json",
)


def same_figures(study: Path) -> bool:
    return (STUDY / "compared/compare.json").read_bytes() == (study / STUDY / "compared/compare.json").read_bytes()


def kill_stages(folder: Path) -> int:
    """SIGKILL to all that runs in this folder but this process; how many there were. They are children of the tests'
    server of forks, which may be another process's."""
    killed = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            own = process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE
            if not own and Path(process.cwd()) == folder:
                process.kill()
                killed += 1
    return killed


def test_stages_killed_at_all_kinds_of_moments_come_to_the_same_comparison(study, world, here):
    """What a kill of stage and pipeline leaves on the disk is the same: a pipeline notes nothing of a stage's fall."""
    laid_out(world)
    left, ended = [*MOMENTS], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            for moment in [m for m in left if (STUDY / m).exists()]:
                if kill_stages(here):
                    left.remove(moment)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        told = [align("study.yaml", stage=pipeline)]
        while told[-1].status == 2 and len(told) <= len(MOMENTS):
            told.append(align("study.yaml", stage=pipeline))
    finally:
        ended.set()
        watcher.join()
    assert told[-1].status == 0, told[-1].out
    assert left == []
    assert same_figures(study)


def stages_of(child: Child) -> list[psutil.Process]:
    """With the server that they are forks of; none as long as that imports what they need, which takes seconds."""
    with suppress(psutil.Error):
        for server in psutil.Process(child.process.pid).children():
            if stages := server.children(recursive=True):
                return [server, *stages]
    return []


@pytest.mark.parametrize("whole", [True, False], ids=["with its stages", "alone"])
def test_a_pipeline_killed_at_all_kinds_of_moments_comes_to_the_same_comparison(whole, study, world, here):
    laid_out(world)
    for moment in ("stages/sft.json", *MOMENTS):
        child = Child(here, "study.yaml", stage=pipeline, shared=True)
        assert child.send_when(signal.SIGKILL, (STUDY / moment).exists, wait=600), moment  # several stages come before
        if whole:
            kill_stages(here)
    told = align("study.yaml", stage=pipeline)
    assert told.status == 0, told.out + told.err
    assert same_figures(study)


@pytest.mark.parametrize("seed", range(3))
def test_a_pipeline_killed_by_chance_comes_to_the_same_comparison(seed, study, world, here):
    """Each has a server of forks of its own, as a user's has, which is killed too or left."""
    laid_out(world)
    chance = random.Random(seed)
    for _ in range(8 * REPEATS):
        child = Child(here, "study.yaml", stage=pipeline)
        while child.process.is_alive() and not stages_of(child):
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 5))
        family = stages_of(child)
        if not child.send_when(signal.SIGKILL, lambda: True):
            break
        for process in family if chance.random() < 0.7 else ():
            with suppress(psutil.Error):
                process.kill()
    told = align("study.yaml", stage=pipeline)
    assert told.status == 0, told.out + told.err
    assert same_figures(study)
