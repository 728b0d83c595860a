"""GRPO and distillation killed and gone on with end equal to the bit, and two processes sample and learn as one."""

from __future__ import annotations

import signal

import pytest
import torch
from ppo_start import make_start
from samplers import make_teacher, recipe_of
from sharding import Job, alone, assert_same, place, together
from test_processes import free_port
from test_resume import records
from world import Child, align, flat, lines, metrics, tree, weights

from align import distill, grpo

SETTINGS = {
    grpo: {"minibatches": 2, "resample": 1, "equal_groups": "drop", "rewards": [{"function": "test_grpo:tied"}]},
    distill: {"on_policy": 0.7, "divergence": "jsd"},
}
STEPS = 3
GENERATE = {"max_rows": 2, "scores": [{"function": "ppo_start:watching"}], "generation": {"max_new": 4}}


@pytest.fixture(
    scope="module", params=[grpo, pytest.param(distill, marks=pytest.mark.slow)], ids=lambda stage: stage.__name__
)
def whole(request, world, cache, tmp_path_factory):
    """A run that nothing stopped, its recipe and its stage."""
    stage, folder = request.param, tmp_path_factory.mktemp("whole")
    start = make_start(world, cache, tmp_path_factory)
    make_teacher(world, start, cache)
    train = {"steps": STEPS, "eval_every": 2, "save_every": 1, "generate": GENERATE}
    recipe = recipe_of(world, start, folder / "run.yaml", stage, SETTINGS[stage], train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe, stage=stage)
    assert (told.status, told.err) == (0, "")
    return folder / "run", recipe, stage


def test_killed_and_gone_on_with_a_run_ends_equal(whole, here):
    reference, recipe, stage = whole
    run = here / "run"
    child = Child(here, recipe, f"run={run}", stage=stage)
    assert child.send_when(signal.SIGKILL, lambda: records(run) >= 4)  # of six lines
    assert child.wait().status == -signal.SIGKILL
    assert not (run / "final").exists()
    told = align(recipe, f"run={run}", stage=stage)
    assert told.status == 0, told.err
    assert "going on from" in told.out
    assert metrics(run) == metrics(reference)
    assert weights(run).keys() == weights(reference).keys()
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(reference).items())
    assert set(tree(run)) == set(tree(reference))
    assert lines(run / "answers.jsonl") == lines(reference / "answers.jsonl")
    if stage is grpo:
        assert lines(run / "episodes.jsonl") == lines(reference / "episodes.jsonl")


def test_two_processes_are_as_one(whole, here):
    reference, recipe, stage = whole
    for child in Child.pair(here, free_port(), recipe, f"run={here / 'two'}", stage=stage):
        told = child.wait()
        assert (told.status, told.err) == (0, "")
    for found, record in zip(metrics(here / "two"), metrics(reference), strict=True):
        exact = ("step", "split", "tokens_seen", "response_tokens", "sampled_tokens", "learnt_groups", "updates")
        assert [found.get(name) for name in exact] == [record.get(name) for name in exact]
        assert found.get("generate/watching") == record.get("generate/watching")
        assert flat(found) == pytest.approx(flat(record), rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trunk_in_shards_samples_and_learns_as_a_whole_one(world, cache, here, tmp_path_factory, monkeypatch):
    """One prompt a step, so that of two processes one has nothing to sample."""
    monkeypatch.setattr("world.WAIT", 600)
    start = make_start(world, cache, tmp_path_factory)
    make_teacher(world, start, cache)
    own = {
        "grpo": (grpo, {"kl": "reward", "rewards": [{"adapter": str(start.reward)}]}),
        "beside": (distill, {"on_policy": 0.5}),
    }
    scores = [{"adapter": str(start.reward), "name": "gold"}, *GENERATE["scores"]]
    train = {"steps": 2, "eval_every": 1, "save_every": 1, "generate": GENERATE | {"scores": scores}}
    jobs = [
        Job(
            stage.__name__.removeprefix("align."),
            recipe_of(world, start, place(here, name), stage, more, train=train, batch={"examples": 1}),
        )
        for name, (stage, more) in own.items()
    ]
    known = [alone(job) for job in jobs]
    together(here, jobs)
    for job, folder in zip(jobs, known, strict=True):
        assert_same(job.folder, folder)
