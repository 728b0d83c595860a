"""Two hosts: a process that is killed, or a cable that is cut, ends the run on both within a minute, with the reason.
Started again, it ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from hosts import two_hosts
from ppo_start import make_start, recipe_of
from safetensors.torch import load_file
from test_processes import free_port
from world import metrics

from align import ppo, sft

MINUTE = 60.0  # seconds
TIMES = int(os.environ.get("ALIGN_FAILURES", "1"))  # of each kind, for each stage, with whole trunks and with shards
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 * TIMES)]
SEED = int(os.environ.get("ALIGN_SEED", "0"))


@pytest.fixture(scope="module")
def hosts():
    try:
        with two_hosts() as both:
            yield both
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here ({getattr(error, 'stderr', None) or error})")


@pytest.fixture
def recipe_for(world, cache, here, tmp_path_factory):
    def recipe(stage):
        if stage is ppo:
            train = {"steps": 6, "save_every": 2}
            return recipe_of(world, make_start(world, cache, tmp_path_factory), here / "recipe.yaml", train=train)
        train = {"steps": 30, "eval_every": 10, "save_every": 5}
        return world.recipe(here / "recipe.yaml", batch={"examples": 2}, train=train)

    return recipe


def result(run):
    """The trained tensors of `final/`, file by file."""
    files = sorted((run / "final").rglob("*.safetensors"))
    assert files
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize("shard", ["none", "layers"])
@pytest.mark.parametrize("stage", [sft, ppo], ids=["sft", "ppo"])
def test_a_failure_ends_both_hosts_and_a_rerun_ends_the_same(stage, shard, recipe_for, here, hosts):
    recipe, draw = recipe_for(stage), random.Random(f"{SEED} {stage.__name__} {shard}")
    asked, undisturbed = (recipe, f"train.shard={shard}"), here / "undisturbed"
    told = [child.wait() for child in hosts.pair(here, free_port(), *asked, f"run={undisturbed}", stage=stage)]
    assert [one.status for one in told] == [0, 0], told
    assert ("\nsharded: " in told[0].out) == (shard == "layers")
    records, took = len(metrics(undisturbed)), {"killed": [], "cut": []}
    for number, how in enumerate([*took] * TIMES):
        run, when = here / f"run{number}", draw.randrange(records)
        file = run / "metrics.jsonl"
        reached = lambda: (file.read_bytes().count(b"\n") if file.is_file() else 0) >= when  # noqa: E731, B023
        children = hosts.pair(here, free_port(), *asked, f"run={run}", stage=stage)
        if how == "killed":
            victim = draw.randrange(2)
            assert children[victim].send_when(9, reached if when else run.exists)
            ended = [children[1 - victim]]
        else:
            assert children[0].send_when(0, reached if when else run.exists)
            hosts.cut()
            ended = children
        began = time.monotonic()
        told = [child.wait() for child in ended]
        took[how].append(time.monotonic() - began)
        hosts.mend()
        assert took[how][-1] < MINUTE
        assert not (run / "final").exists()
        for one in told:
            assert one.status == 2, one
            assert "Traceback" not in one.err, one.err
        if how == "killed":
            assert f"process {victim} (host {hosts.names[victim]}, pid {children[victim].process.pid})" in told[0].err
            assert "has ended without a word" in told[0].err
        else:
            assert f"process 1 (host {hosts.names[1]}, pid" in told[0].err
            assert f"process 0 (host {hosts.names[0]}, pid" in told[1].err
            assert all("its host is down, or the network to it" in one.err for one in told)
        told = [child.wait() for child in hosts.pair(here, free_port(), *asked, f"run={run}", stage=stage)]
        assert [one.status for one in told] == [0, 0], told
        assert metrics(run) == metrics(undisturbed)
        final = result(run)
        assert all(torch.equal(tensor, final[name]) for name, tensor in result(undisturbed).items())
    for how, seconds in took.items():
        said = f"{len(seconds)} times, ended after {min(seconds):.1f} to {max(seconds):.1f} s"
        print(f"\n{stage.__name__}, {shard}, {how}: {said}", flush=True)


@pytest.mark.parametrize("how", ["killed", "cut"])
def test_two_launchers_end_too(how, world, here, hosts):
    """accelerate's launcher on each host, a process each: none of it is left."""
    recipe = world.recipe(here / "recipe.yaml", train={"steps": 5000, "eval_every": None, "save_every": 20})
    port, launched = free_port(), []
    for host in range(2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        command += ["--num_machines", "2", "--machine_rank", str(host), "--main_process_ip", hosts.address(0)]
        command += ["--main_process_port", str(port), "-m", "align.sft", str(recipe)]
        launched.append(hosts.launch(host, command, here / f"host{host}.log"))
    said = lambda host: (here / f"host{host}.log").read_text()  # noqa: E731
    file, deadline = here / "run" / "metrics.jsonl", time.monotonic() + 300
    while not file.is_file() or file.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline, said(0) + said(1)
        time.sleep(0.1)
    processes = [psutil.Process(one.pid).children(recursive=True) for one in launched]
    if how == "killed":
        processes[1][-1].kill()  # the one that trains
    else:
        hosts.cut()
    began = time.monotonic()
    statuses = [one.wait(MINUTE) for one in launched]
    took = time.monotonic() - began
    hosts.mend()
    assert 0 not in statuses
    assert f"process 1 (host {hosts.names[1]}" in said(0)
    if how == "cut":
        assert f"process 0 (host {hosts.names[0]}" in said(1)
    assert not [one for both in processes for one in both if one.is_running() and one.status() != "zombie"]
    print(f"\nlaunchers {how}: ended after {took:.1f} s", flush=True)
