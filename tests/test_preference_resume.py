"""Reward and DPO as the spine holds them: killed or stopped they end equal, and on two processes as on one."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from test_processes import free_port
from test_resume import records
from world import Child, align, flat, metrics, tree, weights

from align import dpo, reward

pytestmark = pytest.mark.slow  # SFT, PPO and GRPO are stopped and killed in the default run

TRAIN = {"steps": 8, "eval_every": 4, "save_every": 2}
KINDS = {
    "reward": (reward, {"train": TRAIN}),
    "dpo": (dpo, {"train": TRAIN, "lora": {"dropout": 0.1}}),
    "cached": (dpo, {"train": TRAIN, "dpo": {"reference": "cached"}, "lora": None, "optim": {"learning_rate": 0.003}}),
    "kto": (dpo, {"train": TRAIN, "dpo": {"loss": "kto"}}),
}


@pytest.fixture(scope="module")
def whole(world, cache, tmp_path_factory):
    """Of each kind a recipe and, once it is asked for, a run that nothing stopped."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def of(kind):
        stage, sections = KINDS[kind]
        if kind not in made:
            recipe = world.preferences(folder / f"{kind}.yaml", stage, run=str(folder / kind), **sections)
            told = align(recipe, stage=stage)
            assert told.status == 0, told.err
            made[kind] = folder / kind, recipe, stage
        return made[kind]

    return of


def assert_equal(run, reference):
    """Every number of every step, the weights, align.json, and the files."""
    assert metrics(run) == metrics(reference)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(reference).items())
    assert (run / "final" / "align.json").read_text() == (reference / "final" / "align.json").read_text()
    assert set(tree(run)) == set(tree(reference))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_then_killed_a_run_ends_equal(whole, here, kind):
    """A signal early, SIGKILL in the middle of what went on from there, and then to the end."""
    reference, recipe, stage = whole(kind)
    run = here / "run"
    child = Child(here, recipe, f"run={run}", stage=stage)
    assert child.send_when(signal.SIGTERM, lambda: records(run) >= 2)
    told = child.wait()
    assert (told.status, told.err) == (0, "")
    assert "stopped by a signal after step" in told.out
    child = Child(here, recipe, f"run={run}", stage=stage)
    assert child.send_when(signal.SIGKILL, lambda: records(run) >= 7)  # of eleven lines
    assert child.wait().status == -signal.SIGKILL
    assert not (run / "final").exists()
    told = align(recipe, f"run={run}", stage=stage)
    assert told.status == 0, told.err
    assert "going on from" in told.out
    assert_equal(run, reference)


@pytest.mark.parametrize(("kind", "examples"), [("kto", 3), ("reward", 1), ("dpo", 1), ("dpo", 5)])
def test_two_processes_are_as_one(world, here, kind, examples):
    """With one pair a step, of which the second process has none; accuracy to the last digit, all else to 1e-5."""
    stage, sections = KINDS[kind]
    train = {"steps": 6, "eval_every": 3}
    sections = sections | {"lora": {"r": 4}, "batch": {"examples": examples}, "train": train}
    recipe = world.preferences(here / "recipe.yaml", stage, **sections)
    told = align(recipe, stage=stage)
    assert told.status == 0, told.err
    for child in Child.pair(here, free_port(), recipe, f"run={here / 'two'}", stage=stage):
        told = child.wait()
        assert (told.status, told.err) == (0, "")
    one, two = here / "run", here / "two"
    for found, record in zip(metrics(two), metrics(one), strict=True):
        exact = ("step", "split", "tokens_seen", "accuracy")
        assert [found.get(name) for name in exact] == [record.get(name) for name in exact]
        assert flat(found) == pytest.approx(flat(record), rel=1e-5, abs=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-5, atol=1e-5)
    about, other = (json.loads((run / "final" / "align.json").read_text()) for run in (one, two))
    assert other == about | {name: pytest.approx(about[name], rel=1e-4) for name in about if name.startswith("score_")}
