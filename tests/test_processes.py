"""The number of processes changes nothing but the time: same losses, same eval figures, same examples."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import deciding
import pytest
import scarce
import torch
from world import WAIT, Child, align, metrics, weights, write_rows

STEPS = 20


@pytest.fixture(scope="module")
def alone(world, cache, tmp_path_factory):
    """Twenty steps of one example on one process (of two, one then has no rows), and the recipe."""
    folder = tmp_path_factory.mktemp("alone")
    train = {"steps": STEPS, "eval_every": 5, "save_every": 5}
    recipe = world.recipe(folder / "recipe.yaml", batch={"examples": 1}, train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe)
    assert told.status == 0, told.err
    return folder / "run", recipe


def pair(here, *argv):
    """Run to the end on two processes; what the first said."""
    first, second = (child.wait() for child in Child.pair(here, free_port(), *argv))
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert (first.err, second.out, second.err) == ("", "", "")
    return first.out


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_close(run, other):
    """Losses, eval figures and weights to 1e-5, gradient norms to 1e-4; what was seen, exactly."""
    ours, theirs = metrics(run), metrics(other)
    assert [set(record) for record in ours] == [set(record) for record in theirs]
    for record, reference in zip(ours, theirs, strict=True):
        exact = {"step", "split", "epoch", "tokens", "tokens_seen", "learning_rate"} & set(record)
        assert {name: record[name] for name in exact} == {name: reference[name] for name in exact}
        numbers = set(record) - exact - {"grad_norm"}
        assert {n: record[n] for n in numbers} == pytest.approx({n: reference[n] for n in numbers}, rel=1e-5, abs=1e-5)
        assert record.get("grad_norm", 0.0) == pytest.approx(reference.get("grad_norm", 0.0), rel=1e-4)  # 20 steps on
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-5, atol=1e-5)


def test_two_processes_are_as_one_even_when_stopped_and_gone_on_with(alone, here):
    """One run of two processes to the end; one stopped by a signal to its second process, then gone on with by two
    processes (every number equal) and by one (the same examples)."""
    reference, recipe = alone
    said = pair(here, recipe, f"run={here / 'two'}")
    assert "on 2 x cpu" in said
    assert_close(here / "two", reference)

    stopped = here / "stopped"
    first, second = Child.pair(here, free_port(), recipe, f"run={stopped}")
    file = stopped / "metrics.jsonl"
    assert second.send_when(signal.SIGTERM, lambda: file.is_file() and file.read_bytes().count(b"\n") >= 4)
    assert [child.wait().status for child in (first, second)] == [0, 0]
    step = metrics(stopped, "train")[-1]["step"]
    assert 3 <= step < STEPS
    assert f"stopped by a signal after step {step} of {STEPS}" in first.wait().out

    on_one = shutil.copytree(stopped, here / "on_one")
    assert f"(step {step} of {STEPS})" in pair(here, recipe, f"run={stopped}")
    assert metrics(stopped) == metrics(here / "two")
    assert all(torch.equal(tensor, weights(stopped)[n]) for n, tensor in weights(here / "two").items())
    assert f"(step {step} of {STEPS})" in align(recipe, f"run={on_one}").out
    assert_close(on_one, reference)
    assert metrics(on_one)[: step + 1] == metrics(stopped)[: step + 1]


def test_rows_fit_where_the_least_memory_is_free(world, here):
    """All processes lay out the same rows, and see the same examples as one process does."""
    recipe = world.recipe(here / "recipe.yaml", batch={"examples": 12, "row_tokens": "auto"}, train={"steps": 4})
    assert "rows of up to 2,048 tokens" in align(recipe).out
    for name, number in (("max", 10**9), ("current", 10**9)):
        (here / f"memory.{name}").write_text(f"{number}\n")
    (here / "memory.stat").write_text("inactive_file 0\n")
    children = Child.pair(here, free_port(), here, recipe, f"run={here / 'two'}", stage=scarce)
    first, second = (child.wait() for child in children)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "rows of up to 256 tokens" in first.out
    assert "peak: " in first.out
    assert_close(here / "two", here / "run")


@pytest.mark.slow
def test_a_real_launcher(world, here):
    """Several rows a step, on processes that torchrun starts (accelerate's own launcher starts one on a CPU)."""
    recipe = world.recipe(here / "recipe.yaml", batch={"examples": 5}, train={"steps": STEPS})
    assert align(recipe).status == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "align.sft", str(recipe), f"run={here / 'launched'}"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=env)
    assert told.returncode == 0, told.stderr
    assert "on 2 x cpu" in told.stdout
    assert told.stdout.count("done: ") == 1
    assert_close(here / "launched", here / "run")


@pytest.mark.slow
def test_a_fault_on_two_processes(world, here):
    """Both end with status 2, whether both find it or the first alone, without a traceback; nothing is written."""
    (here / "bad.jsonl").write_text('{"messages": []}\n')
    recipe = world.recipe(here / "recipe.yaml")
    faults = {here / "rows": "data.train.0.path=bad.jsonl", here / "recipe": "optim.eps=none"}
    for folder in faults:
        folder.mkdir()
    for pair in [Child.pair(folder, free_port(), recipe, fault) for folder, fault in faults.items()]:
        first, second = (child.wait() for child in pair)
        assert (first.status, second.status) == (2, 2), second.err
        assert first.err
        assert "Traceback" not in first.err + second.err
        assert not (here / "run").exists()


def test_what_the_first_process_finds_holds_for_all(here):
    """What it gives, what it refuses, that it was asked to stop, that it failed; they wait for days, not minutes."""
    children = {}
    for how in ("gives", "refuses", "stops", "fails"):
        (here / how).mkdir()
        children[how] = Child.pair(here / how, free_port(), how, stage=deciding)
    told = {how: [child.wait() for child in pair] for how, pair in children.items()}
    assert [one.out.splitlines() for one in told["gives"]] == [
        ["seen by 0 [0]", "seen by 0 [0, 0]", "True False", "30 days"],
        ["seen by 0 []", "seen by 1 [1]", "True False", "30 days"],
    ]
    assert [(one.status, one.out) for one in told["refuses"]] == [(2, "")] * 2
    assert [one.err for one in told["refuses"]] == ["it is not there\n", ""]
    assert [(one.status, one.out) for one in told["stops"]] == [(0, "")] * 2
    first, second = told["fails"]
    assert (first.status, second.status, second.err) == (1, 1, "")
    assert "KeyError: 'a fault'\nthis is a fault of align itself; please report it" in first.err


@pytest.mark.slow
def test_one_that_dies_or_fails_or_does_not_come_ends_the_other(here):
    """Even where the first does not look: it waits for nobody, and would print what it decides alone."""
    told = {}
    for how in ("dies", "fails alone", "comes late"):
        (here / how).mkdir()
        began = time.monotonic()
        told[how] = [child.wait() for child in Child.pair(here / how, free_port(), how, stage=deciding)]
        assert time.monotonic() - began < 60
    first, second = told["dies"]
    assert (first.status, second.status) == (2, 9)
    assert re.search(r"^process 1 \(host .*, pid \d+\) has ended without a word: .*start it again", first.err)
    first, second = told["fails alone"]
    assert (first.status, second.status, second.err) == (2, 2, "its disk is not there\n")
    assert re.search(r"^process 1 \(host .*\) has ended: its disk is not there; this run ends here", first.err)
    first, second = told["comes late"]
    assert (first.status, second.status) == (2, 2)
    assert first.err.startswith("of 2 processes, 1 did not come within 1 seconds")
    assert "process 1 of 2 does not find process 0" in second.err
    assert "Traceback" not in "".join(one.err for pair in told.values() for one in pair)


@pytest.mark.slow
def test_a_killed_first_process_ends_those_that_wait_for_it(world, here):
    """While it tokenises a large set, for which the other waits as long as it takes."""
    write_rows(here / "many.jsonl", [{"text": f"{'word ' * 40}{i}"} for i in range(60_000)])
    recipe = world.recipe(here / "recipe.yaml", data={"train": [{"path": "many.jsonl"}], "eval": {"sources": []}})
    files = partial((Path(os.environ["ALIGN_CACHE"]) / "tokens").glob, ".*.new/tokens.bin")
    before = {*files()}
    first, second = Child.pair(here, free_port(), recipe)
    assert first.send_when(signal.SIGKILL, lambda: {*files()} > before)
    began = time.monotonic()
    told = second.wait()
    assert told.status == 2, told.err
    assert "Traceback" not in told.err
    assert time.monotonic() - began < 20
    assert not (here / "run").exists() or not any((here / "run").iterdir())
