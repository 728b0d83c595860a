"""A signal is heeded within seconds, wherever a run is, and what goes on then ends as if it never came."""

from __future__ import annotations

import signal
import time
from functools import partial

import pytest
import torch
from ppo_start import make_start, recipe_of
from world import Child, align, lines, metrics, weights, write_rows

from align import ppo, reward

pytestmark = pytest.mark.slow  # a signal between two steps is in test_resume.py and test_ppo_resume.py

SOON = 6  # seconds from a signal to the end of the process on a busy machine; each wait below is longer without it


def stopped(child, ready, number=signal.SIGTERM):
    """What a run said that was asked to stop as soon as `ready()`, and ended at once with status 0."""
    assert child.send_when(number, ready), child.log.read_text()
    sent = time.monotonic()
    told = child.wait()
    assert (told.status, told.err) == (0, ""), told.err
    assert time.monotonic() - sent < SOON
    return told.out


def has(run, text, name="metrics.jsonl"):
    """Whether a file of a run holds this text."""
    file = run / name
    return lambda: file.is_file() and text in file.read_bytes()


@pytest.fixture(scope="module")
def slow(world, cache, tmp_path_factory):
    """A recipe whose evaluations and answers take long, and a run of it that nothing stopped."""
    folder = tmp_path_factory.mktemp("slow")
    write_rows(folder / "held.jsonl", [{"text": f"{word} " * 30 + str(i)} for i in range(150) for word in ("a", "b")])
    recipe = world.recipe(
        folder / "recipe.yaml",
        data={"train": [{"path": str(world.texts)}], "eval": {"sources": [{"path": str(folder / "held.jsonl")}]}},
        batch={"examples": 2, "row_tokens": 64},
        lora={"dropout": 0.1},
        train={"steps": 4, "eval_every": 2, "save_every": None},
        log={"samples": ["Peru?"], "sample_tokens": 12, "trackers": []},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe)
    assert told.status == 0, told.err
    assert metrics(folder / "run", "eval")[-1]["step"] == 4
    return folder / "run", recipe


def test_in_evaluations_and_before_and_after_training(slow, here):
    """At once in the first evaluation, in one that is between steps, and in the last, before which a checkpoint is
    saved; the run that goes on then is the same as one that nothing stopped."""
    whole, recipe = slow
    run = here / "run"
    start = [here, recipe, f"run={run}"]
    assert "stopped by a signal" in stopped(Child(*start), (run / "samples.jsonl").exists)
    assert metrics(run) == []
    assert "stopped by a signal after step 2 of 4" in stopped(Child(*start), has(run, b'"step": 2'), signal.SIGINT)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert metrics(run, "eval")[-1]["step"] == 0
    saved = (run / "checkpoints" / "step-000004" / "manifest.json").exists
    assert "stopped by a signal after step 4 of 4" in stopped(Child(*start), saved)
    assert not (run / "final").exists()
    assert align(*start[1:]).status == 0
    assert metrics(run) == metrics(whole)
    assert lines(run / "samples.jsonl") == lines(whole / "samples.jsonl")
    assert all(torch.equal(t, weights(run)[name]) for name, t in weights(whole).items())


def test_while_it_tokenises_and_while_it_scores_demonstrations(world, cache, here):
    """Nothing is there yet, and nothing is left; then all is there but the scores' mean."""
    write_rows(here / "many.jsonl", [{"text": f"{'stop ' * 40}{i}"} for i in range(60_000)])
    recipe = world.recipe(here / "recipe.yaml", data={"train": [{"path": "many.jsonl"}], "eval": {"sources": []}})
    files = partial((cache / "tokens").glob, ".*.new/tokens.bin")
    before = {*files()}  # of processes that other tests killed
    said = stopped(Child(here, recipe, f"run={here / 'none'}"), lambda: {*files()} > before)
    assert said == "stopped by a signal; run the same command again to go on\n"
    assert not (here / "none").exists()
    write_rows(here / "said.jsonl", [{"prompt": f"Say {i}", "completion": "yes " * 30 + str(i)} for i in range(400)])
    scores = world.preferences(
        here / "reward.yaml", reward, train={"steps": 1, "eval_every": None}, batch={"row_tokens": 64},
        data={"train": [{"path": str(world.pairs)}], "eval": {"sources": []}},
        reward={"demonstrations": [{"path": "said.jsonl"}], "demonstration_rows": 400},
    )  # fmt: skip
    run = here / "scores"
    child = Child(here, scores, f"run={run}", stage=reward)
    assert "after step 1 of 1" in stopped(child, (run / "checkpoints/step-000001/manifest.json").exists)
    assert not (run / "final").exists()
    assert align(scores, f"run={run}", stage=reward).status == 0


def test_in_the_middle_of_a_sampling(world, cache, here, tmp_path_factory):
    """Long responses of PPO's second step: the state is that after the first, and the second comes out the same."""
    start = make_start(world, cache, tmp_path_factory)
    recipe = recipe_of(
        world, start, here / "recipe.yaml", train={"steps": 2, "eval_every": None, "save_every": None},
        ppo={"rewards": [{"function": "ppo_start:watching"}], "generation": {"max_new": 240, "min_new": 240}},
        batch={"examples": 2},
    )  # fmt: skip
    assert align(recipe, f"run={here / 'whole'}", stage=ppo).status == 0
    run, seen = here / "run", []
    first = has(run, b'"step": 1, "split": "train"')

    def sampling() -> bool:
        if not seen and first():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + 0.4

    said = stopped(Child(here, recipe, f"run={run}", stage=ppo), sampling)
    assert "stopped by a signal after step 1 of 2" in said
    assert align(recipe, f"run={run}", stage=ppo).status == 0
    assert metrics(run) == metrics(here / "whole")
