"""PPO and GRPO where reward functions fail: what has no score is left out, or the run ends with its state saved; and
processes that a function has for itself do not outlive the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ppo_start
import pytest
import samplers
import torch
from ppo_start import UNEVALUATED, make_start, wordy
from test_processes import free_port
from world import Child, align, alive, lines, metrics, weights

from align import grpo, ppo

SAMPLES = {ppo: 2, grpo: 3}
calls = []


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


def recipe_of(world, start, path, stage, own, **sections):
    if stage is ppo:
        return ppo_start.recipe_of(world, start, path, ppo=own, **sections)
    return samplers.recipe_of(world, start, path, grpo, own, **sections)


def but_last(prompts, responses, rows):
    """No score for the last response to each prompt."""
    last = [prompt != after for prompt, after in zip(prompts, [*prompts[1:], None], strict=True)]
    return [None if none else x for none, x in zip(last, wordy(prompts, responses, rows), strict=True)]


def flaky(prompts, responses, rows):
    """While a file `down` is there, fails from the second call on."""
    calls.append(len(responses))
    if len(calls) > 1 and Path("down").exists():
        raise ConnectionError("down")
    return wordy(prompts, responses, rows)


def elsewhere(prompts, responses, rows):
    """Fails in the second process, from its second call on, where the file `down` is."""
    calls.append(len(responses))
    if os.environ["RANK"] == "1" and len(calls) > 1 and Path("down").exists():
        raise ConnectionError("down")
    return wordy(prompts, responses, rows)


def sleepy(prompts, responses, rows):
    """Notes its process and one that it starts, and does not come back."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open("pids", "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(600)


@pytest.mark.parametrize("stage", SAMPLES)
def test_a_response_without_a_score_is_as_one_that_was_not_sampled(world, start, here, stage):
    """Draws depend on the number of the sample alone, so a run with one response fewer to a prompt is the same run."""
    rewards = {
        "left": [{"function": "test_left_out:but_last", "name": "part", "on_failure": "leave_out"}],
        "never": [{"function": "ppo_start:wordy", "name": "part"}],
    }
    for name, parts in rewards.items():
        own = {"rewards": parts, "samples": SAMPLES[stage] - (name == "never"), "epochs": 2, "minibatches": 2}
        recipe = recipe_of(world, start, here / f"{name}.yaml", stage, own, data=UNEVALUATED, batch={"examples": 3})
        told = align(recipe, stage=stage)
        assert (told.status, told.err) == (0, "")
        assert ("such responses are left out" in told.out) == (name == "left")
    left, never = (weights(here / name) for name in rewards)
    assert left.keys() == never.keys()
    assert all(torch.equal(tensor, never[name]) for name, tensor in left.items())
    (found,), (expected,) = (metrics(here / name) for name in rewards)
    assert found.pop("failures/part") == 3
    assert found["sampled_tokens"] > expected["sampled_tokens"]
    over_all = ("sampled_tokens", "response_tokens", "ended", "tokens")
    assert {k: v for k, v in found.items() if k not in over_all} == {
        k: v for k, v in expected.items() if k not in over_all
    }


def test_an_evaluation_counts_what_has_a_score(world, start, here):
    rewards = [
        {"function": "test_left_out:but_last", "on_failure": "leave_out"},
        {"function": "ppo_start:wordy", "weight": 0.0},
    ]
    recipe = recipe_of(world, start, here / "run.yaml", grpo, {"rewards": rewards, "eval_samples": 2})
    told = align(recipe, stage=grpo)
    assert (told.status, told.err) == (0, "")
    for record in metrics(here / "run", "eval"):
        assert record["failures/but_last"] == 3
        assert record["score"] == pytest.approx(record["score/but_last"])
        assert record["score_low"] < record["score"] < record["score_high"]
    assert all(isinstance(row["score"], float) for row in lines(here / "run" / "episodes.jsonl"))


@pytest.mark.parametrize("policy", [pytest.param("stop", marks=pytest.mark.slow), "leave_out"])
def test_a_function_that_fails_for_good_ends_the_run_with_its_state_saved(world, start, here, policy):
    """What it is called like may change when the run goes on, which then ends like one that never failed."""
    own = {"rewards": [{"function": "test_left_out:flaky", "on_failure": policy}]}
    train = {"steps": 2, "eval_every": None, "save_every": None}
    recipe = recipe_of(world, start, here / "run.yaml", grpo, own, data=UNEVALUATED, train=train)
    told = align(recipe, f"run={here / 'whole'}", stage=grpo)
    assert told.status == 0, told.err
    calls.clear()
    (here / "down").touch()
    told = align(recipe, stage=grpo)
    saved = "; the state after step 1 is saved: run the same command again to resume\n"
    why = "the reward function test_left_out:flaky failed (ConnectionError: down)"
    assert (told.status, told.err) == (2, f"{'no response got a score: ' * (policy == 'leave_out')}{why}{saved}")
    (here / "down").unlink()
    told = align(recipe, "grpo.rewards.0.retries=2", "grpo.rewards.0.on_failure=leave_out", stage=grpo)
    assert (told.status, told.err) == (0, "")
    assert "going on from" in told.out
    expected, found = weights(here / "whole"), weights(here / "run")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_what_a_killed_run_has_started_is_gone(world, start, here):
    """Processes of a function, and what those have started."""
    own = {"rewards": [{"function": "test_left_out:sleepy", "processes": 2}]}
    child = Child(here, recipe_of(world, start, here / "run.yaml", grpo, own, data=UNEVALUATED), stage=grpo)
    pids = here / "pids"
    assert child.send_when(signal.SIGKILL, lambda: pids.is_file() and len(pids.read_text().split()) == 4)
    assert child.wait().status == -signal.SIGKILL
    numbers, end = [int(word) for word in pids.read_text().split()], time.monotonic() + 20
    while alive(*numbers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(*numbers)


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all_with_the_state_saved(world, start, here):
    """And with `leave_out` the other process's responses are still learnt from, and both count the same."""
    rewards = [{"function": "test_left_out:elsewhere"}]
    train = {"steps": 2, "eval_every": None, "save_every": None}
    recipe = recipe_of(world, start, here / "run.yaml", grpo, {"rewards": rewards}, data=UNEVALUATED, train=train)
    (here / "down").touch()
    told = [child.wait() for child in Child.pair(here, free_port(), recipe, stage=grpo)]
    assert [one.status for one in told] == [2, 2]
    assert all(
        "test_left_out:elsewhere failed (ConnectionError: down); the state after step 1 is" in t.err for t in told
    )
    assert (here / "run" / "checkpoints" / "step-000001" / "manifest.json").exists()
    children = Child.pair(here, free_port(), recipe, "grpo.rewards.0.on_failure=leave_out", "--fresh", stage=grpo)
    assert [child.wait().status for child in children] == [0, 0]
    first, second = metrics(here / "run", "train")
    assert first["failures/elsewhere"] == 0
    assert second["failures/elsewhere"] == 4, "of nine"
