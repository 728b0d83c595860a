"""Rollouts by a server, align.serve: what a run leaves and tells, on one process and two; and what becomes of it when
the server is killed, started again, has another model, or refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
from ppo_start import MOST, UNEVALUATED, make_start
from samplers import make_teacher, recipe_of
from served import Ours
from test_processes import free_port
from test_resume import records
from world import Child, align, flat, lines, metrics, tree

from align import distill, grpo, ppo
from align.training.rollouts.remote import Adapter, Remote

FIGURES = {"mismatch_kl", "importance", "importance_capped"}
meddling = []  # what the reward function does in its calls, one after another


def meddled(prompts, responses, rows):
    """Equal for all, and something happens to the server meanwhile."""
    if meddling and (action := meddling.pop(0)):
        action()
    return [0.0] * len(responses)


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


@pytest.fixture(scope="module")
def server(start, cache, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        server = Ours(tmp_path_factory.mktemp("server"), start.base, "--adapters", str(tmp_path_factory.getbasetemp()))
    yield server
    server.kill()


def written(world, start, path, engine, own=None, stage=grpo, **sections):
    """A recipe whose responses a server draws."""
    generation = {"max_new": MOST, "engine": engine}
    return recipe_of(world, start, path, stage, {"generation": generation} | (own or {}), **sections)


@pytest.fixture(scope="module")
def finished(world, start, server, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train = {"steps": 3, "eval_every": 2, "save_every": 1}
    own = {"epochs": 2, "minibatches": 2}
    recipe = written(world, start, folder / "run.yaml", {"url": server.url}, own, train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(recipe, stage=grpo)
    assert (told.status, told.err) == (0, ""), told.err
    return folder / "run", recipe, told


def test_the_engines_agree_and_nothing_of_the_server_stays(finished, server):
    """In float32 both give the same log-probabilities; the adapter is gone from the server and from the disk."""
    run, _, told = finished
    assert f"{server.url} draws the responses, from its model base" in told.out
    told_of = metrics(run)
    assert all(set(record) >= FIGURES for record in told_of)
    assert max(record["mismatch_kl"] for record in told_of) < 1e-6
    assert all(record["importance"] == pytest.approx(1, abs=1e-3) for record in told_of)
    assert {record["importance_capped"] for record in told_of} == {0}
    assert [record["kl"] > 0 for record in metrics(run, "eval")] == [False, True, True]
    assert server.models() == ["base"]
    assert not any(name.startswith("engine") for name in tree(run))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "layers"])
def test_two_processes_ask_for_their_shares(finished, server, here, shard):
    """With seeds the responses are those of one process, and so are the figures; with the trunk in shards too."""
    reference, recipe, _ = finished
    words = f"run={here / 'two'}", f"train.shard={shard}"
    ends = [child.wait() for child in Child.pair(here, free_port(), recipe, *words, stage=grpo)]
    assert [(told.status, told.err) for told in ends] == [(0, "")] * 2
    assert ("\nsharded: " in ends[0].out) == (shard == "layers")
    assert server.models() == ["base"]
    for found, record in zip(metrics(here / "two"), metrics(reference), strict=True):
        assert found["mismatch_kl"] < 1e-6
        assert found["response_tokens"] == record["response_tokens"]
        assert flat(found) == pytest.approx(flat(record), rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_a_killed_server_ends_the_run_and_the_same_command_goes_on(world, start, server, here):
    """The state after the last step is there. Then the server is started again while equal groups of the last step wait
    to be sampled anew: it has lost the adapter, and loads it within the step."""
    own = {"rewards": [{"function": "test_rollout_server:meddled"}], "resample": 1}
    train = {"steps": 3, "eval_every": None, "save_every": None}
    engine = {"url": server.url, "patience": 0.2}
    recipe = written(world, start, here / "run.yaml", engine, own, data=UNEVALUATED, train=train)
    meddling[:] = [None, None, None, server.kill]  # two samplings a step
    told = align(recipe, stage=grpo)
    assert told.status == 2
    assert f"grpo.generation.engine: {server.url} does not answer" in told.err
    assert "run the same command again to go on" in told.err
    assert len(told.err.splitlines()) == 1
    assert "asked again for up to 0.2 seconds" in told.out
    run = here / "run"
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == [1, 2]
    assert (run / "checkpoints" / "step-000002").is_dir()
    assert (run / "report.html").is_file()

    server.start()
    meddling[:] = [lambda: server.kill() or server.start()]
    told = align(recipe, "grpo.generation.engine.patience=60.0", stage=grpo)
    assert (told.status, told.err) == (0, ""), told.err
    assert not meddling
    assert "going on from" in told.out
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert not (run / "engine").exists()
    assert server.models() == ["base"]


@pytest.mark.slow
def test_a_server_that_keeps_the_first_adapter_is_told_of(world, start, server, here, monkeypatch):
    """It says that it has loaded each. At the start they all say the same."""
    load, first = Remote.load, []

    async def kept(self: Remote, adapter: Adapter) -> None:
        first[:] = first or [shutil.copytree(adapter.path, here / self.name)]
        await load(self, adapter._replace(path=str(first[0])))

    monkeypatch.setattr(Remote, "load", kept)
    train = {"steps": 6, "eval_every": None, "save_every": None}
    recipe = written(world, start, here / "run.yaml", {"url": server.url}, data=UNEVALUATED, train=train)
    told = align(recipe, stage=grpo)
    assert (told.status, told.err) == (0, ""), told.err
    assert told.out.count("the server has come away from the actor") == 1


@pytest.mark.parametrize(
    ("engine", "section", "said"),
    [
        ({}, {"model": "another"}, "was trained on a trunk with fingerprint"),
        ({"adapters_there": "/nowhere"}, {}, "does not load the adapter /nowhere/run-"),
        ({"adapters": __file__}, {}, f"grpo.generation.engine.adapters: {__file__} cannot be made (File exists)"),
        ({"api_key_env": "NO_SUCH_KEY"}, {}, "api_key_env: the environment variable NO_SUCH_KEY is not set"),
        ({"url": "http://127.0.0.1:9", "patience": 0.0}, {}, "does not answer"),
        ({"url": "PATH"}, {}, "names no model under /v1/models (status 404"),
        ({}, {"temperature": 0.7}, "start vLLM with --logprobs-mode processed_logprobs"),
    ],
    ids=["another trunk", "unseen folder", "no folder", "no key", "nobody", "no such path", "another temperature"],
)
def test_what_does_not_fit_is_one_line(world, start, server, here, engine, section, said):
    engine = {"url": server.url} | engine
    if engine["url"] == "PATH":
        engine["url"] = f"{server.url}/elsewhere"
    generation = {"max_new": MOST, "engine": engine} | {k: v for k, v in section.items() if k == "temperature"}
    model = {"model": {"base": str(world.base)}} if "model" in section else {}
    recipe = recipe_of(world, start, here / "run.yaml", grpo, {"generation": generation}, data=UNEVALUATED, **model)
    told = align(recipe, stage=grpo)
    assert told.status == 2
    assert said in told.err
    assert len(told.err.splitlines()) == 1
    assert "Traceback" not in told.err


@pytest.mark.slow
@pytest.mark.parametrize("stage", [ppo, distill], ids=lambda stage: stage.__name__)
def test_the_other_stages_sample_by_it_too(world, start, server, cache, here, stage):
    make_teacher(world, start, cache)
    own = {"rewards": [{"adapter": str(start.reward)}]} if stage is ppo else {}
    train = {"steps": 2, "eval_every": 1, "save_every": 1}
    recipe = written(world, start, here / "run.yaml", {"url": server.url}, own, stage, train=train)
    told = align(recipe, stage=stage)
    assert (told.status, told.err) == (0, ""), told.err
    found = metrics(here / "run")
    assert all((set(record) >= FIGURES) == (stage is ppo) for record in found)
    assert json.loads((here / "run" / "final" / "align.json").read_text())["step"] == 2


@pytest.mark.slow
def test_a_server_with_a_key_and_without_adapters(world, start, here, monkeypatch):
    """Each refusal is one line with its remedy; the key stands in no file of the run."""
    (here / "key").write_text("sesame-and-more")
    server = Ours(here, start.base, "--api-key-file", str(here / "key"))
    try:
        for key, said in ((None, "refuses the API key (status 401"), ("wrong", "refuses the API key (status 401")):
            engine = {"url": server.url} | ({"api_key_env": "THE_KEY"} if key else {})
            monkeypatch.setenv("THE_KEY", key or "")
            told = align(written(world, start, here / "run.yaml", engine, data=UNEVALUATED), stage=grpo)
            assert told.status == 2
            assert said in told.err
        monkeypatch.setenv("THE_KEY", "sesame-and-more")
        told = align(written(world, start, here / "run.yaml", engine, data=UNEVALUATED), stage=grpo)
        assert told.status == 2
        assert "cannot load adapters while it runs; start vLLM with --enable-lora" in told.err
        assert not any(b"sesame" in content for name, content in tree(here).items() if name != "key")
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["signal", "patience"])
def test_a_server_that_hangs_holds_up_neither_a_signal_nor_the_end(world, start, server, here, asked):
    """It takes requests and answers none."""
    engine = {"url": server.url, "timeout": 600.0 if asked == "signal" else 5.0, "patience": 1.0}
    train = {"steps": 50, "eval_every": None, "save_every": None}
    recipe = written(world, start, here / "run.yaml", engine, data=UNEVALUATED, train=train)
    child = Child(here, recipe, stage=grpo)
    assert child.send_when(0, lambda: records(here / "run") >= 2)
    os.kill(server.child.process.pid, signal.SIGSTOP)
    try:
        if asked == "signal":
            time.sleep(1.0)
            os.kill(child.process.pid, signal.SIGTERM)
        told = child.wait()
    finally:
        os.kill(server.child.process.pid, signal.SIGCONT)
    assert told.status == (0 if asked == "signal" else 2), told.err
    assert ("stopped by a signal after step" in told.out) == (asked == "signal")
    assert ("gives no answer within 5 seconds" in told.err) == (asked == "patience")
    assert list((here / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_another_temperature_without_weights(world, start, server, here):
    """What cannot be compared is not told, and the run says so."""
    generation = {"max_new": MOST, "temperature": 0.7, "engine": {"url": server.url, "importance_cap": None}}
    recipe = recipe_of(world, start, here / "run.yaml", grpo, {"generation": generation})
    told = align(recipe, stage=grpo)
    assert (told.status, told.err) == (0, ""), told.err
    assert "does not tell how far both engines are apart" in told.out
    assert not FIGURES & set(metrics(here / "run")[0])
