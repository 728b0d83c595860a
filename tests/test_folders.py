"""One folder, two commands: one trains, the other is refused; and --fresh, killed, leaves a whole run or none."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest
from often import REPEATS, repeated
from world import Child, align, metrics, tree

CHANCE = random.Random()


@pytest.fixture(scope="module")
def whole(world, cache, tmp_path_factory):
    """A run that nothing disturbed, and its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = world.recipe(folder / "recipe.yaml", train={"steps": 4, "eval_every": 2, "save_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe)
    assert told.status == 0, told.err
    return folder / "run", recipe


def two_starts(recipe, here, number):
    """Two commands at a random distance; of what they came to, the second's folder is that of the first."""
    run, distance = here / f"run{number}", CHANCE.uniform(0, 0.6)
    first, second = here / f"first{number}", here / f"second{number}"
    for folder in (first, second):
        folder.mkdir()
    one = Child(first, recipe, f"run={run}")
    time.sleep(distance)
    two = Child(second, recipe, f"run={run}")
    return run, [one.wait(), two.wait()]


def assert_one_trained(whole, run, told):
    assert metrics(run) == metrics(whole[0])
    assert sum("done: " in one.out for one in told) == 1
    for one in told:
        assert one.status == 0 or one.err == f"run: another process is writing to {run}; wait for it, or stop it\n"


def assert_nothing_changes(whole, run, told):
    before = tree(whole[0])
    assert tree(run) == before
    assert {one.status for one in told} <= {0, 2}


@pytest.mark.slow
@pytest.mark.timeout(1800 * REPEATS)
@pytest.mark.parametrize("times", [50 * REPEATS])
def test_two_starts_at_once(whole, here, times):
    for number in range(times):
        run, told = two_starts(whole[1], here, number)
        assert_one_trained(whole, run, told)
        if number % 10 > 1:
            continue
        kept = tree(run)
        again = [Child(here / f"{name}{number}", whole[1], f"run={run}") for name in ("first", "second")]
        for child in again:
            told = child.wait()
            assert "nothing to do" in told.out or "another process is writing to" in told.err
        assert tree(run) == kept  # finished, it is left as it is


@pytest.mark.parametrize("times", [1, pytest.param(20 * REPEATS, marks=repeated)])
def test_fresh_killed_then_the_plain_command(whole, here, times):
    """At a random moment, and as soon as the old run is gone; the plain command then has one whole run, old or new."""
    run = shutil.copytree(whole[0], here / "run")
    (run / "notes.txt").write_text("mine")
    for number in range(times):
        after = time.monotonic() + CHANCE.uniform(0.1, 1.5)
        ready = (lambda: not (run / "final").exists()) if number == 0 else (lambda at=after: time.monotonic() > at)
        child = Child(here, whole[1], f"run={run}", "--fresh")
        child.send_when(signal.SIGKILL, ready)
        assert child.wait().status in (0, -signal.SIGKILL)
        told = align(whole[1], f"run={run}")
        assert told.status == 0, told.err
        assert metrics(run) == metrics(whole[0])
        assert set(tree(run)) == {*tree(whole[0]), "notes.txt"}
        assert not list(run.rglob(".*"))


def test_killed_between_a_checkpoint_and_the_deletion_of_an_older_one(whole, here):
    run = shutil.copytree(whole[0], here / "run")
    shutil.rmtree(run / "final")
    shutil.copytree(run / "checkpoints" / "step-000003", run / "checkpoints" / "step-000002")
    told = align(whole[1], f"run={run}")
    assert told.status == 0, told.err
    assert set(tree(run)) == set(tree(whole[0]))
