"""Whatever stops a run, the same command goes on from the last checkpoint, and every number comes out the same."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import Child, align, lines, metrics, tree, weights

from align.models.trunk import Trunk
from align.training.runs.checkpoint import newest_checkpoint

LOG = {"samples": ["Name the capital of Peru"], "sample_tokens": 4, "trackers": []}
TRAIN = {"steps": 12, "eval_every": 4, "save_every": 2}


@pytest.fixture(scope="module")
def whole(world, cache, tmp_path_factory):
    """A run that nothing stopped, with the recipe of all runs here; dropout, so that its random state counts."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = world.recipe(folder / "recipe.yaml", lora={"dropout": 0.1}, train=TRAIN, log=LOG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe)
    assert told.status == 0, told.err
    return folder / "run", recipe


@pytest.fixture
def run(whole, here):
    """A copy of it to do harm to."""
    return shutil.copytree(whole[0], here / "run")


def go_on(whole, run, *more):
    """Start the run again; what it says."""
    told = align(whole[1], f"run={run}", *more)
    assert told.status == 0, told.err
    return told.out


def assert_equal(run, whole):
    assert metrics(run) == metrics(whole[0])
    assert lines(run / "samples.jsonl") == lines(whole[0] / "samples.jsonl")
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole[0]).items())
    assert {name for name in tree(run) if "tensorboard" not in name} == set(tree(whole[0]))


def records(run):
    """How many lines metrics.jsonl has."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_equal(whole, here):
    """SIGKILL: at a random moment of the whole process, at a random line, and in the middle of a save."""
    run, draw = here / "run", random.Random()
    after, line = time.monotonic() + draw.uniform(0.1, 1.5), draw.randint(3, 9)
    moments = {
        "at a random moment": lambda: time.monotonic() > after,
        f"at line {line}": lambda: records(run) >= line,
        "in a save": lambda: any((run / "checkpoints").glob(".writing-*/*")),
    }
    for moment in moments.values():
        child = Child(here, whole[1], f"run={run}")
        assert child.send_when(signal.SIGKILL, moment)
        assert child.wait().status == -signal.SIGKILL
    go_on(whole, run)
    assert_equal(run, whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_saves_and_says_how_to_go_on(whole, here, number):
    run = here / "run"
    child = Child(here, whole[1], f"run={run}")
    assert child.send_when(number, lambda: records(run) >= 4)
    told = child.wait()
    assert (told.status, told.err) == (0, "")
    step = metrics(run, "train")[-1]["step"]
    assert 3 <= step < 12
    assert f"stopped by a signal after step {step} of 12; run the same command again to go on" in told.out
    assert newest_checkpoint(run / "checkpoints") == (run / "checkpoints" / f"step-{step:06d}", [])
    assert (run / "report.html").is_file()
    assert not (run / "final").exists()
    assert f"going on from {run}/checkpoints/step-{step:06d} (step {step} of 12)" in go_on(whole, run)
    assert_equal(run, whole)


def test_a_run_killed_after_its_last_step_only_finishes(whole, run):
    shutil.rmtree(run / "final")
    (run / "report.html").unlink()
    assert "train step" not in go_on(whole, run)
    assert_equal(run, whole)


def test_a_damaged_checkpoint_is_passed_over(whole, run):
    shutil.rmtree(run / "final")
    damaged = run / "checkpoints" / "step-000012"
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"oops")
    said = go_on(whole, run)
    assert f"{damaged} is passed over: model.safetensors has changed since it was written" in said
    assert f"going on from {run}/checkpoints/step-000010" in said
    assert_equal(run, whole)


def test_without_a_whole_checkpoint_it_starts_over(whole, run):
    shutil.rmtree(run / "final")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("{")
    said = go_on(whole, run)
    assert said.count("manifest.json is damaged") == 2
    assert "going on" not in said
    assert_equal(run, whole)


def test_a_line_torn_by_a_kill_is_written_anew(whole, run):
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(text[:-2]) + text[-2][:20])
    go_on(whole, run)
    assert_equal(run, whole)


def test_a_full_disk_keeps_what_was_saved(whole, run):
    """RLIMIT_FSIZE refuses the next checkpoint as a full disk does."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    saved = tree(run / "checkpoints")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        told = align(whole[1], f"run={run}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.status == 2
    assert told.err.count("\n") == 1
    assert "step-000012: cannot be written: File too large" in told.err
    assert "What was saved before is still whole" in told.err
    assert tree(run / "checkpoints") == saved
    go_on(whole, run)
    assert_equal(run, whole)


def test_a_disk_that_fills_up(world, here):
    """On a real file system of one checkpoint and a half: no space is left for the second."""
    disk = here / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        recipe = world.recipe(here / "recipe.yaml", lora=None, train={"steps": 6, "save_every": 2})
        told = align(recipe, f"run={disk / 'run'}")
        assert told.status == 2
        assert told.err.count("\n") == 1
        assert "No space left on device" in told.err
        assert newest_checkpoint(disk / "run" / "checkpoints") == (disk / "run" / "checkpoints" / "step-000002", [])
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert align(recipe, f"run={disk / 'run'}").status == 0
        assert align(recipe).status == 0
        assert metrics(disk / "run") == metrics(here / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_loss_that_is_not_finite_stops_before_the_step(world, here):
    """A rate of 1e30 makes the second loss NaN; the state after the first step stays."""
    told = align(world.recipe(here / "recipe.yaml", optim={"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup": 0}))
    assert told.status == 2
    assert told.err.startswith("step 2: the loss is not finite (loss nan, ")
    assert f"the state after step 1 is saved in {here}/run/checkpoints" in told.err
    assert "start again in another run folder with a lower optim.learning_rate" in told.err
    assert str(world.talks) in told.err  # the examples of that step
    assert "Traceback" not in told.err
    assert newest_checkpoint(here / "run" / "checkpoints") == (here / "run" / "checkpoints" / "step-000001", [])
    assert [record["step"] for record in metrics(here / "run", "train")] == [1]


def test_a_poisoned_weight_is_never_trained_on(world, here):
    base = shutil.copytree(world.base, here / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    recipe = world.recipe(here / "recipe.yaml", model={"base": str(base), "layout": "tree"})
    told = align(recipe)
    assert told.status == 2
    assert "model.layers.1.mlp.down_proj.weight has values that are not finite numbers" in told.err
    assert not (here / "run").exists() or metrics(here / "run", "train") == []


def test_a_loss_that_is_not_finite_is_never_trained_on(world, here, monkeypatch):
    """Weights that are finite, and numbers that are not."""
    forward = Trunk.forward
    monkeypatch.setattr(Trunk, "forward", lambda self, forest: forward(self, forest) * float("nan"))
    recipe = world.recipe(here / "recipe.yaml", model={"layout": "tree"})
    told = align(recipe)
    assert told.status == 2
    assert told.err.startswith("step 0: the eval rows' loss is not finite (nan); check model.base")
    told = align(recipe, "run=unseen", "data.eval.sources=[]")
    assert told.status == 2
    assert told.err.startswith("step 1: the loss is not finite (loss nan, ")
    assert metrics(here / "unseen", "train") == []


def test_another_run_is_not_written_over(whole, run):
    before = tree(run)
    told = align(whole[1], f"run={run}", "optim.learning_rate=0.5", "seed=3")
    assert told.status == 2
    assert told.err == (
        f"run: {run} holds another run, which differs in seed: 17 there, 3 here; optim.learning_rate: 0.02 there, "
        "0.5 here; name another folder (run=…), or start over with --fresh, which deletes it\n"
    )
    assert tree(run) == before


def test_fresh_replaces_a_run(whole, run):
    go_on(whole, run, "--fresh", "train.steps=2", "train.eval_every=null")
    assert [record["step"] for record in metrics(run)] == [0, 1, 2, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]


def test_fresh_with_a_fault_leaves_the_old_run(whole, run, here):
    (here / "bad.jsonl").write_text('{"messages": [}\n')
    before = tree(run)
    for fault in ("data.train.0.path=bad.jsonl", "data.train.0.path=none.jsonl", "model.base=./none"):
        assert align(whole[1], f"run={run}", "--fresh", fault).status == 2
    assert tree(run) == before


def test_a_folder_of_other_files_is_refused_even_fresh(whole, here):
    """A recipe.yaml, checkpoints/ and final/ that somebody else made do not make it a run."""
    run = here / "thesis"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    for name in ("checkpoints/step-000001/model.pt", "final/result.csv"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("theirs")
    for mine in (None, "stage: sft\n", whole[1].read_text()):
        if mine:
            (run / "recipe.yaml").write_text(mine)
        before = tree(run)
        for more in ((), ("--fresh",)):
            told = align(whole[1], f"run={run}", *more)
            assert (told.status, told.err) == (
                2,
                f"run: {run} holds files but no run of align (no recipe.yaml that a run wrote); name another folder\n",
            )
        assert tree(run) == before
