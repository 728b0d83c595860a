"""`model.add_tokens` through the command, with DoRA: stopped and resumed, on two processes, and what follows it."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from test_preference_resume import assert_equal
from test_processes import assert_close, free_port
from test_resume import records
from transformers import AutoTokenizer
from world import Child, align, metrics, talk, write_rows

from align import chat, classify, dpo, evaluate, serve

TOKENS = ["<|call|>", "<|back|>"]
SHORT = {"steps": 1, "eval_every": None, "save_every": None}


@pytest.fixture(scope="module")
def taught(world, cache, tmp_path_factory):
    """A run that nothing stopped, and its recipe."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [talk(f"Call {i}", f"<|call|>{i}<|back|> I did.", "<|call|>") for i in range(12)]
    data = {"train": [{"path": str(write_rows(folder / "rows.jsonl", rows))}], "eval": {"sources": [], "fraction": 0.2}}
    sections = {"model": {"add_tokens": TOKENS}, "lora": {"dora": True}, "data": data}
    train = {"steps": 4, "eval_every": None, "save_every": 2}
    recipe = world.recipe(folder / "r.yaml", run=str(folder / "run"), train=train, **sections)
    told = align(recipe)
    assert (told.status, told.err) == (0, "")
    return folder / "run", recipe


def test_stopped_and_gone_on_with_it_ends_equal(taught, here):
    reference, recipe = taught
    child = Child(here, recipe, f"run={here / 'run'}")
    assert child.send_when(signal.SIGTERM, lambda: records(here / "run") >= 2)
    assert "stopped by a signal" in child.wait().out
    assert "going on from" in align(recipe, f"run={here / 'run'}").out
    assert_equal(here / "run", reference)


@pytest.mark.slow
def test_two_processes_are_as_one(taught, here):
    reference, recipe = taught
    for child in Child.pair(here, free_port(), recipe, f"run={here / 'two'}"):
        assert (child.wait().status, child.wait().err) == (0, "")
    assert_close(here / "two", reference)


def test_its_rows_are_learnt_and_go_where_the_result_goes(taught, world, here, monkeypatch):
    final, recipe = taught[0] / "final", taught[1]
    losses = [record["loss"] for record in metrics(taught[0], "eval")]
    assert losses[-1] < losses[0]
    tokenizer, plain = AutoTokenizer.from_pretrained(final), AutoPeftModelForCausalLM.from_pretrained(final)
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    rows = plain.get_input_embeddings().weight[ids]
    assert (rows[0] - rows[1]).abs().max() > 0.01, "they began alike"

    # A next stage stands on the merged rows, and its policy and evaluation have them.
    preferences = world.preferences(here / "dpo.yaml", dpo, model={"adapter": str(final)}, train=SHORT)
    assert align(preferences, stage=dpo).status == 0
    about = json.loads((here / "run" / "final" / "align.json").read_text())
    assert [link["name"] for link in about["trunk"]] == [str(world.base), str(final)]

    # An evaluation of the policy itself needs the rows in its trunk.
    made = {
        "stage": "evaluate",
        "run": str(here / "evaluated"),
        "model": {"base": str(world.base), "dtype": "float32"},
        "policy": str(final),
        "data": {"train": [{"path": str(world.pairs), "limit": 2}]},
        "evaluate": {"generation": {"max_new": 3}},
    }
    (here / "e.yaml").write_text(json.dumps(made))
    told = align(here / "e.yaml", stage=evaluate)
    assert told.status == 2
    assert f"brings rows of added tokens; give model.add_tokens: {TOKENS}" in told.err
    told = align(here / "e.yaml", f"model.add_tokens={json.dumps(TOKENS)}", stage=evaluate)
    assert (told.status, told.err) == (0, "")

    # Chat finds them by itself.
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert align(final, stage=chat).status == 0

    # A server's one trunk is without them, whatever else stands on it.
    for served in (final, here / "run" / "final"):
        told = align(served, stage=serve)
        assert told.status == 2
        assert f"{final} brings rows of added tokens; merge {served} with align.merge" in told.err

    # Once the recipe names other tokens, it is another run.
    told = align(recipe, "model.add_tokens=['<|call|>']", "--fresh", f"run={here / 'other'}", "train.steps=1")
    assert told.status == 0
    assert torch.isfinite(torch.tensor(metrics(here / "other", "eval")[-1]["loss"]))


def test_a_classifier_brings_its_rows(world, here, monkeypatch):
    rows = [{"text": f"<|call|> {i}" if i % 2 else f"no {i}", "label": "ab"[i % 2]} for i in range(16)]
    data = {"train": [{"path": str(write_rows(here / "c.jsonl", rows))}], "eval": {"sources": []}}
    sections = {"model": {"add_tokens": TOKENS[:1]}, "train": SHORT, "data": data}
    told = align(world.recipe(here / "c.yaml", stage="classify", **sections), stage=classify)
    assert (told.status, told.err) == (0, "")
    told = align("--predict", here / "run" / "final", here / "c.jsonl", stage=classify)
    assert (told.status, told.err) == (0, "")
    assert len(told.out.splitlines()) == 17
