"""Supervised fine-tuning through its command, on a model of 40,000 weights: what it leaves, says and learns."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from data.voices import FORGETFUL
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import align, lines, metrics, tree, weights

UNEVALUATED = {"eval_every": None, "save_every": None}
QUESTION = "Name the capital of Peru"


@pytest.fixture(scope="module")
def finished(world, cache, tmp_path_factory):
    """A run of 12 steps, with its recipe and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        log = {"samples": [QUESTION], "sample_tokens": 8, "trackers": ["tensorboard"]}
        recipe = world.recipe(folder / "recipe.yaml", log=log)
        told = align(recipe)
    assert (told.status, told.err) == (0, ""), told.err
    return folder / "run", recipe, told


def train(world, here, name="run", **sections):
    """Train by a recipe with these sections; the run's folder."""
    told = align(world.recipe(here / f"{name}.yaml", run=str(here / name), **sections))
    assert told.status == 0, told.err
    return here / name


def losses(run, split="train"):
    return [record["loss"] for record in metrics(run, split)]


def test_exactly_these_files_are_left(finished):
    run, _, _ = finished
    found = {re.sub(r"events\.out.*", "events", name) for name in tree(run)}
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    adapter = ("adapter_config.json", "adapter_model.safetensors", "align.json", "generation_config.json")
    tokenizer = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert found == {
        *("recipe.yaml", "environment.json", "data.json", "ledger.jsonl", "metrics.jsonl", "samples.jsonl"),
        *("summary.json", "report.html", "tensorboard/events"),
        *(f"checkpoints/step-{step:06d}/{name}" for step in (9, 12) for name in checkpoint),  # keep: 2
        *(f"final/{name}" for name in (*adapter, *tokenizer)),
    }


def test_metrics_have_every_figure_of_every_step(finished):
    run, _, told = finished
    records = lines(run / "metrics.jsonl")
    train, held = ([r for r in records if r["split"] == split] for split in ("train", "eval"))
    assert [r["step"] for r in train] == list(range(1, 13))
    assert [r["step"] for r in held] == [0, 4, 8, 12]
    assert all(
        set(record) == {
            *("step", "split", "loss", "learning_rate", "grad_norm", "epoch", "tokens", "tokens_seen"),
            *("step_seconds", "elapsed_seconds", "tokens_per_second"),
        }
        for record in train
    )  # fmt: skip
    assert all(set(r) == {"step", "split", "loss", "perplexity", "eval_seconds"} for r in held)
    assert all(after["tokens_seen"] - before["tokens_seen"] == after["tokens"] for before, after in pairwise(train))
    assert train[0]["learning_rate"] == pytest.approx(0.02 / 3)  # the first of two steps of warm-up
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"]), rel=1e-12) for r in held)
    assert f"perplexity {held[-1]['perplexity']:.4g}" in told.out


def test_the_loss_falls_on_both_sides(finished):
    run, _, _ = finished
    assert losses(run)[0] - losses(run)[-1] > 0.2
    assert losses(run, "eval")[0] - losses(run, "eval")[-1] > 0.2


def test_eval_loss_is_what_transformers_computes_from_final(finished, world):
    """Token by token, one conversation at a time, with plain peft and transformers."""
    run, _, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), run / "final")
    data = json.loads((run / "data.json").read_text())
    nll = count = 0
    for row in lines(world.held):
        messages = row["messages"]
        before = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        labels = ids[0, len(before) :]
        nll -= logprobs[len(before) - 1 :].gather(1, labels[:, None]).sum().item()
        count += len(labels)
    assert losses(run, "eval")[-1] == pytest.approx(nll / count, rel=1e-5)
    assert data["eval"]["trained_tokens"] == count


def test_samples_are_answered_before_and_after(finished):
    run, _, _ = finished
    before, after = lines(run / "samples.jsonl")
    assert (before["step"], after["step"]) == (0, 12)
    assert before["prompt"] == after["prompt"] == QUESTION
    assert before["response"] != after["response"]


def test_what_is_written_beside_the_metrics(finished, world):
    run, _, told = finished
    data, summary = (json.loads((run / name).read_text()) for name in ("data.json", "summary.json"))
    assert data["train"]["examples"] + data["eval"]["examples"] == 28 + 7
    assert sum(data["train"]["lengths"]["counts"]) == data["train"]["examples"]
    assert all(line in told.out for line in data["summary"])
    assert (run / "ledger.jsonl").read_text() == ""
    assert summary["steps"] == 12
    assert summary["tokens_seen"] == lines(run / "metrics.jsonl")[-2]["tokens_seen"]
    assert summary["tokens_per_second"] > 0
    assert summary["mfu"] is None  # no one knows this machine's peak
    assert json.loads((run / "environment.json").read_text())["processes"] == 1
    meta = json.loads((run / "final" / "align.json").read_text())
    assert (meta["stage"], meta["role"], meta["base"]) == ("sft", "adapter", str(world.base))


def test_the_report_stands_alone_and_shows_the_numbers(finished):
    run, _, _ = finished
    page = (run / "report.html").read_text("utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"' >]+|url\(\s*["']?(?!data:|#)|@import""", page)
    assert QUESTION in page
    first, *_, last = (f"{record['perplexity']:.4g}" for record in metrics(run, "eval"))
    assert f"{first} → {last}" in page


def test_show_prints_marked_tokens_and_trains_nothing(world, here):
    recipe = world.recipe(here / "recipe.yaml")
    told = align(recipe, "--show")
    assert told.status == 0
    assert len(re.findall(r"talks\.jsonl:\d+ \(\d+ tokens, \d+ trained\)", told.out)) == 3
    assert re.search(r"assistant\n⟦It is .*<\|im_end\|>⟧", told.out), told.out
    assert set(tree(here)) == {"recipe.yaml"}


def test_a_second_call_has_nothing_to_do(finished, monkeypatch, cache):
    run, recipe, _ = finished
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    before = tree(run)
    told = align(recipe)
    assert told.status == 0
    assert f"{run}/final is already there: nothing to do (--fresh starts over, --extend trains on)" in told.out
    assert tree(run) == before


def test_the_saved_recipe_is_a_recipe_of_the_same_run(finished, here):
    run, _, _ = finished
    assert align(run / "recipe.yaml", f"run={here / 'again'}").status == 0
    assert metrics(here / "again") == metrics(run)
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(here / "again").items())


def test_rows_that_are_dropped_are_in_the_ledger(world, here):
    source = here / "some.jsonl"
    rows = world.talks.read_text("utf-8").splitlines()
    long = rows[0].replace("Name", "Name " * 200)
    source.write_text("\n".join([*rows[:10], '{"messages": []}', long]), encoding="utf-8")
    data = {"train": [{"path": str(source)}], "overlong": "drop", "invalid": "drop", "max_length": 256}
    run = train(world, here, data=data, train={"steps": 1})
    assert [(entry["line"], entry["action"]) for entry in lines(run / "ledger.jsonl")] == [
        (11, "dropped"),
        (12, "dropped"),
    ]
    empty, overlong = (entry["reason"] for entry in lines(run / "ledger.jsonl"))
    assert empty == "messages: expected a list of turns, found the list []"
    assert overlong == "more than 256 tokens"


def test_plain_text_from_random_weights_is_learned(world, here):
    """Pre-training: every weight trains, from a new model of another size than the base."""
    texts = {"train": [{"path": str(world.texts)}], "eval": {}}
    fresh = {"init": "random", "config": {"hidden_size": 48, "num_hidden_layers": 1}}
    log = {"samples": ["The capital of"], "samples_as": "text", "sample_tokens": 8}
    run = train(world, here, model=fresh, lora=None, data=texts, train={"steps": 40}, batch={"examples": 7}, log=log)
    assert losses(run)[0] > 5.5  # log 420 = 6.04: it knows nothing
    assert losses(run)[-1] < 1.5
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (48, 1)
    assert ": " in lines(run / "samples.jsonl")[-1]["response"]  # as in "France: Paris"


def test_all_weights_are_trained_without_lora(world, here):
    run = train(world, here, lora=None, optim={"learning_rate": 0.003})
    assert losses(run, "eval")[-1] < losses(run, "eval")[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    base = AutoModelForCausalLM.from_pretrained(world.base)
    still = [n for (n, p), (_, q) in zip(model.named_parameters(), base.named_parameters(), strict=True) if p.equal(q)]
    assert still == []
    meta = json.loads((run / "final" / "align.json").read_text())
    assert meta["role"] == "model"


@pytest.mark.parametrize(
    "section",
    [
        {"batch": {"row_tokens": 1}},  # every example a row of its own
        pytest.param({"batch": {"row_tokens": 2048}}, marks=pytest.mark.slow),  # all in one row
        {"model": {"layout": "padded"}},
        {"model": {"gradient_checkpointing": True}},
    ],
    ids=lambda section: str(*section.values()),
)
def test_what_must_not_change_the_numbers(section, finished, world, here):
    """Neither rows, layout nor recomputing changes an update or an eval figure, though the rows differ."""
    reference, _, _ = finished
    run = train(world, here, **section)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    assert losses(run, "eval") == pytest.approx(losses(reference, "eval"), rel=1e-5)
    norms = ([record["grad_norm"] for record in metrics(r, "train")] for r in (run, reference))
    assert next(norms) == pytest.approx(next(norms), rel=1e-3)


def test_dropout_is_random_and_repeats(world, here, finished):
    first, second = (train(world, here, name, lora={"dropout": 0.3}, train=UNEVALUATED) for name in ("first", "second"))
    assert metrics(first) == metrics(second)
    assert len(losses(first)) == len(losses(finished[0]))
    assert losses(first)[1:] != losses(finished[0])[1:]


def test_an_empty_thought_of_the_template_is_told_and_learnt_if_asked_for(world, here):
    template = here / "forgetful.jinja"
    template.write_text(FORGETFUL, "utf-8")
    recipe = world.recipe(here / "recipe.yaml", model={"chat_template": str(template)}, train={"steps": 1})
    told = align(recipe)
    assert told.status == 0, told.err
    assert "writes an empty thought before an answer that has none: it is context" in told.out
    told = align(recipe, "run=asked", "sft.empty_thoughts=true")
    assert told.status == 0, told.err
    assert "empty thought" not in told.out
    trained = [
        json.loads((here / run / "data.json").read_text())["train"]["trained_tokens"] for run in ("run", "asked")
    ]
    assert trained[0] < trained[1]
