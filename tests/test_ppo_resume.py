"""PPO stopped, killed and gone on with ends equal to the bit, and on two processes it samples and learns as on one."""

from __future__ import annotations

import signal

import pytest
import torch
from ppo_start import SAMPLES, make_start, recipe_of
from safetensors.torch import load_file
from test_processes import free_port
from test_resume import records
from world import Child, align, flat, lines, metrics, tree

from align import ppo

EXAMPLES, KL_COEF, TARGET, HORIZON = 3, 0.2, 0.5, 40
STEPS = 3


@pytest.fixture(scope="module")
def whole(world, cache, tmp_path_factory):
    """A run that nothing stopped, and its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    start = make_start(world, cache, tmp_path_factory)
    section = {"kl_coef": KL_COEF, "kl_target": TARGET, "kl_horizon": HORIZON, "minibatches": 2, "epochs": 1}
    section["rewards"] = [{"adapter": str(start.reward)}, {"function": "ppo_start:wordy"}]
    recipe = recipe_of(
        world, start, folder / "run.yaml", ppo=section, batch={"examples": EXAMPLES},
        train={"steps": STEPS, "eval_every": 2, "save_every": 1},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe, stage=ppo)
    assert (told.status, told.err) == (0, "")
    return folder / "run", recipe


def results(run):
    """What the run trained and thought best, by file."""
    return {name: load_file(run / name / "adapter_model.safetensors") for name in ("best", "final")}


def assert_same_texts(run, reference):
    """What was said at every evaluation, and the score of it to float tolerance."""
    for found, row in zip(lines(run / "episodes.jsonl"), lines(reference / "episodes.jsonl"), strict=True):
        assert found == row | {"score": pytest.approx(row["score"], rel=1e-4, abs=1e-4)}


def test_stopped_then_killed_a_run_ends_equal(whole, here):
    """A signal early, SIGKILL in the middle of what went on from there, and then to the end."""
    reference, recipe = whole
    run = here / "run"
    child = Child(here, recipe, f"run={run}", stage=ppo)
    assert child.send_when(signal.SIGTERM, lambda: records(run) >= 2)
    told = child.wait()
    assert (told.status, told.err) == (0, "")
    assert "stopped by a signal after step" in told.out
    before = records(run)  # two to four of six lines
    child = Child(here, recipe, f"run={run}", stage=ppo)
    assert child.send_when(signal.SIGKILL, lambda: records(run) > before)
    assert child.wait().status == -signal.SIGKILL
    assert not (run / "final").exists()
    told = align(recipe, f"run={run}", stage=ppo)
    assert told.status == 0, told.err
    assert "going on from" in told.out
    assert metrics(run) == metrics(reference)
    assert lines(run / "episodes.jsonl") == lines(reference / "episodes.jsonl")
    for name, tensors in results(reference).items():
        assert (run / name / "align.json").read_text() == (reference / name / "align.json").read_text()
        assert all(torch.equal(tensor, results(run)[name][key]) for key, tensor in tensors.items())
    assert set(tree(run)) == set(tree(reference))


def test_the_coefficient_follows_its_target(whole):
    """kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon), step by step (and so past a resume, as above)."""
    steps = metrics(whole[0], "train")
    expected = KL_COEF
    for record in steps:
        assert record["kl_coef"] == pytest.approx(expected, rel=1e-9)
        error = min(max(record["kl"] / TARGET - 1, -0.2), 0.2)
        expected *= 1 + error * EXAMPLES * SAMPLES / HORIZON
    assert len({record["kl_coef"] for record in steps}) == STEPS
    assert metrics(whole[0], "eval")[-1]["kl_coef"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_another_run_starts_from_its_actor_and_critic(whole, here):
    """From its folder both, with their moments; from its result the actor alone. It then says what it said before."""
    reference, recipe = whole
    last, critics = metrics(reference, "eval")[-1], {}
    both = f"weights and AdamW's moments of step {STEPS}"
    for start, what in ((reference, both), (reference / "final", "its weights;")):
        run = here / start.name
        told = align(recipe, f"run={run}", "train.steps=1", f"train.start_from={start}", stage=ppo)
        assert told.status == 0, told.err
        assert f": {what}" in told.out
        first = metrics(run, "eval")[0]
        assert first | {name: last[name] for name in ("step", "kl_coef", "reward")} == last  # less a penalty of its own
        critics[start.name] = metrics(run, "train")[0]["loss/value"]
    assert critics["run"] != critics["final"]


@pytest.mark.slow  # GRPO is with two processes in the default run
def test_two_processes_are_as_one(whole, here):
    """With three prompts a step; the same responses, figures and weights."""
    reference, recipe = whole
    for child in Child.pair(here, free_port(), recipe, f"run={here / 'two'}", stage=ppo):
        told = child.wait()
        assert (told.status, told.err) == (0, "")
    two = here / "two"
    for found, record in zip(metrics(two), metrics(reference), strict=True):
        exact = ("step", "split", "tokens_seen", "response_tokens", "ended", "updates")
        assert [found.get(name) for name in exact] == [record.get(name) for name in exact]
        assert flat(found) == pytest.approx(flat(record), rel=1e-5, abs=1e-5)
    assert_same_texts(two, reference)
    for name, tensors in results(reference).items():
        torch.testing.assert_close(results(two)[name], tensors, rtol=1e-5, atol=1e-5)
