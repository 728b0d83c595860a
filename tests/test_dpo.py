"""DPO and its kin through the command, on a model of 40,000 weights: every figure as plain transformers computes it."""

from __future__ import annotations

import json
import math
import re
from statistics import fmean

import pytest
import torch
from plain import Policy, merged
from transformers import AutoModelForCausalLM
from world import align, flat, in_two, lines, metrics, tree, weights

from align import dpo

FIRST = {"metric": "loss", "goal": "greatest"}  # the loss falls, so the best evaluation is the first
TRAIN = {"steps": 8, "eval_every": 4}
SHORT = {"steps": 3, "eval_every": None}
FULL = {"lora": None, "optim": {"learning_rate": 0.003}}
BETA = 0.1


def run_dpo(world, here, name="run", **sections):
    """Train by a recipe with these sections; the run's folder and what was said."""
    recipe = world.preferences(here / f"{name}.yaml", dpo, run=str(here / name), **{"train": TRAIN} | sections)
    told = align(recipe, stage=dpo)
    assert (told.status, told.err) == (0, ""), told.err
    return here / name, told.out


def train(world, here, name="run", **sections):
    return run_dpo(world, here, name, **sections)[0]


@pytest.fixture(scope="module")
def shared(cache, tmp_path_factory):
    """A folder for the runs that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        yield tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def finished(world, shared):
    log = {"samples": ["Name the capital of Peru"], "sample_tokens": 4}
    return train(world, shared, log=log, train=TRAIN | {"best": FIRST})


@pytest.fixture(scope="module")
def full(world, shared):
    return train(world, shared, "full", **FULL)


def said(result, base, rows):
    """For each row what policy and reference make of its answers, the best first."""
    policy = Policy.load(result, base)
    answers = [[row["completion"]] if "completion" in row else [row["chosen"], row["rejected"]] for row in rows]
    return [[policy.says(row["prompt"], a) for a in given] for row, given in zip(rows, answers, strict=True)]


def softplus(x):
    return math.log1p(math.exp(x))


def log_odds(x):
    return x - math.log(1 - math.exp(x))


LOSSES = {  # the equations of the papers, one pair at a time: c and r what is said of the answers, h the log-ratio
    "sigmoid": lambda c, r, h: softplus(-BETA * h),
    "robust": lambda c, r, h: (0.9 * softplus(-BETA * h) - 0.1 * softplus(BETA * h)) / 0.8,
    "ipo": lambda c, r, h: (h - 1 / (2 * BETA)) ** 2,
    "hinge": lambda c, r, h: max(0.0, 1 - BETA * h),
    "simpo": lambda c, r, h: softplus(0.3 - BETA * (mean(c) - mean(r))),
    "orpo": lambda c, r, h: -mean(c) + BETA * softplus(log_odds(mean(r)) - log_odds(mean(c))),
}


def mean(answer):
    """Log-probability per token."""
    return answer.policy / answer.tokens


def expected(pairs, loss="sigmoid", per_token=False, sft_weight=0.0):
    """The eval record of these pairs."""
    free = loss in ("simpo", "orpo")

    def ratio(answer):
        whole = answer.policy - (0.0 if free else answer.reference)
        return whole / answer.tokens if per_token or free else whole

    rewards = [(BETA * ratio(c), BETA * ratio(r)) for c, r in pairs]
    figures = {
        "loss": fmean(LOSSES[loss](c, r, ratio(c) - ratio(r)) - sft_weight * mean(c) for c, r in pairs),
        "accuracy": fmean(c > r for c, r in rewards),
        "rewards/chosen": fmean(c for c, _ in rewards),
        "rewards/rejected": fmean(r for _, r in rewards),
        "margin": fmean(c - r for c, r in rewards),
    }
    for i, name in enumerate(("chosen", "rejected")):
        answers = [pair[i] for pair in pairs]
        nll = -sum(a.policy for a in answers)
        figures |= {f"logprobs/{name}": -nll / len(pairs)}
        figures |= {f"nll_per_token/{name}": nll / sum(a.tokens for a in answers)}
    if not free:
        figures["kl_per_token"] = sum(a.kl for p in pairs for a in p) / sum(a.tokens for p in pairs for a in p)
    return figures


def assert_same(record, figures, rel=1e-5):
    assert {name: record[name] for name in figures} == pytest.approx(figures, rel=rel, abs=2e-6)


def test_exactly_these_files_are_left(finished):
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    final = ("adapter_config.json", "adapter_model.safetensors", "align.json", "generation_config.json")
    tokenizer = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert set(tree(finished)) == {
        *("recipe.yaml", "environment.json", "data.json", "ledger.jsonl", "metrics.jsonl", "summary.json"),
        *("report.html", "samples.jsonl"),
        *(f"checkpoints/step-{step:06d}/{name}" for step in (6, 8) for name in checkpoint),
        *(f"{result}/{name}" for result in ("best", "final") for name in (*final, *tokenizer)),
    }


@pytest.mark.parametrize("kind", ["finished", "full"])
def test_at_the_start_the_policy_is_the_reference(kind, request):
    """Log 2 and a divergence of 0, to the last bit, in the evaluation and in the first step."""
    before, first = metrics(request.getfixturevalue(kind))[:2]
    assert (before["split"], first["split"], first["step"]) == ("eval", "train", 1)
    for record in (before, first):
        assert record["loss"] == pytest.approx(math.log(2), abs=1e-7)  # log 2 in float32
        assert (record["accuracy"], record["margin"], record["rewards/chosen"]) == (0.5, 0.0, 0.0)
    assert before["kl_per_token"] == 0.0


@pytest.mark.parametrize("kind", ["finished", "full"])
def test_it_learns_which_answer_is_better(kind, request):
    """Three of the fourteen held-out pairs are the wrong way round: 11 / 14 is all of it."""
    run = request.getfixturevalue(kind)
    first, *_, last = metrics(run, "train")
    assert last["loss"] < first["loss"] - 0.1
    assert (last["accuracy"], metrics(run, "eval")[-1]["accuracy"]) == (1.0, 11 / 14)


@pytest.mark.parametrize(("kind", "result"), [("finished", "final"), ("finished", "best"), ("full", "final")])
def test_every_figure_is_what_plain_transformers_computes_from_the_result(kind, result, request, world):
    run = request.getfixturevalue(kind)
    about = json.loads((run / result / "align.json").read_text())
    assert (about["stage"], about["base"]) == ("dpo", str(world.base))
    assert about["role"] == {"finished": "adapter", "full": "model"}[kind]
    assert about["step"] == {"best": 4, "final": 8}[result]
    (record,) = (record for record in metrics(run, "eval") if record["step"] == about["step"])
    assert_same(record, expected(said(run / result, world.base, lines(world.held_pairs))))


def test_margins_are_counted_in_bins(finished, world):
    pairs = said(finished / "final", world.base, lines(world.held_pairs))
    margins = [BETA * (c.policy - c.reference - r.policy + r.reference) for c, r in pairs]
    bins = [sum(margin >= edge for edge in dpo.MARGINS) for margin in margins]
    counted = [bins.count(i) / len(bins) for i in range(len(dpo.MARGINS) + 1)]
    assert len(set(bins)) > 2
    assert metrics(finished, "eval")[-1]["margin_share"] == pytest.approx(counted)


@pytest.mark.parametrize(
    "section",
    [
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss": "ipo", "length_normalized": True},
        {"loss": "hinge", "sft_weight": 0.3},
        {"loss": "simpo", "gamma": 0.3},
        {"loss": "orpo"},
    ],
    ids=lambda section: section["loss"],
)
def test_every_loss_is_the_equation_of_its_paper(world, here, section):
    """Over all held-out pairs, and over those of each source with a title."""
    data = {"eval": {"sources": in_two(here, lines(world.held_pairs), 5)}}
    run = train(world, here, dpo=section, train=SHORT, data=data)
    pairs = said(run / "final", world.base, lines(world.held_pairs))
    settings = section["loss"], "length_normalized" in section, section.get("sft_weight", 0.0)
    before, after = metrics(run, "eval")
    assert_same(after, expected(pairs, *settings))
    for title, own in (("few", pairs[:5]), ("more", pairs[5:])):
        assert_same(after, {f"{name}/{title}": figure for name, figure in expected(own, *settings).items()})
    assert after["loss"] < before["loss"]
    assert ("kl_per_token" in after) == (section["loss"] not in ("simpo", "orpo"))


def test_an_sft_result_is_the_trunk_and_so_the_reference(world, here):
    sft = align(world.recipe(here / "sft.yaml", run=str(here / "sft"), train={"steps": 2}))
    assert sft.status == 0, sft.err
    patient = {"steps": 3, "eval_every": 1, "patience": 1, "best": FIRST}
    run = train(world, here, model={"adapter": str(here / "sft" / "final")}, train=patient)
    start = merged(world.base, here / "sft" / "final")
    assert_same(metrics(run, "eval")[-1], expected(said(run / "final", start, lines(world.held_pairs))))
    assert metrics(run, "eval")[0]["margin"] == 0.0
    about = json.loads((run / "final" / "align.json").read_text())
    assert (about["step"], about["ended_by"]) == (2, {"patience": 1, "of_steps": 3})


def test_a_loss_without_reference_loads_none(world, here, monkeypatch):
    """Full fine-tuning with simpo holds one model; with sigmoid a frozen copy beside it; with a cache one again."""
    loaded = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *words, **more: loaded.append(1) or load(*words, **more)
    )
    for section, models in (({"loss": "simpo"}, 1), ({"loss": "sigmoid"}, 2), ({"reference": "cached"}, 1)):
        loaded.clear()
        train(world, here, f"{models}{section}", dpo=section, train={"steps": 1, "eval_every": None}, **FULL)
        assert len(loaded) == models, section


@pytest.mark.parametrize(("kind", "more"), [("finished", {}), pytest.param("full", FULL, marks=pytest.mark.slow)])
def test_a_cached_reference_changes_no_figure(kind, more, request, world, here):
    """To 1e-5: it is computed in other rows than the steps', and float32 sums differ by as much."""
    run = train(world, here, dpo={"reference": "cached"}, **more)
    reference = request.getfixturevalue(kind)
    for record, figures in zip(metrics(run), metrics(reference), strict=True):
        figures.pop("kl_per_token", None)  # the reference itself is not there
        assert flat(record) == pytest.approx(flat(figures), rel=1e-4, abs=1e-5)
    assert {name: w.shape for name, w in weights(run).items()} == {n: w.shape for n, w in weights(reference).items()}


@pytest.mark.slow
def test_the_cache_knows_what_its_numbers_depend_on(world, here, monkeypatch):
    """Another learning rate, beta or loss finds them; another max_length, base or set does not."""
    monkeypatch.setenv("ALIGN_CACHE", str(here / "cache"))
    once = {"train": {"steps": 1, "eval_every": None}}

    def how(name, **sections):
        settings = {"reference": "cached"} | sections.pop("dpo", {})
        out = run_dpo(world, here, name, dpo=settings, **once | sections)[1]
        said = re.findall(r"reference log-probabilities of the (training|eval) rows: (found|computed once)", out)
        assert [side for side, _ in said] == ["training", "eval"]
        return [word for _, word in said]

    new, found = ["computed once"] * 2, ["found"] * 2
    assert how("first") == new
    assert how("rate", optim={"learning_rate": 0.5}, dpo={"beta": 0.3, "loss": "ipo"}, lora={"r": 2}, seed=3) == found
    for file in (here / "cache" / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert how("damaged") == new
    cut = {"max_length": 110, "overlong": "truncate"}
    assert how("cut", data=cut) == new
    assert how("longer", data={"max_length": 1000}) == found  # nothing is cut by it
    assert how("other rows", data={"train": [{"path": str(world.pairs), "limit": 5}]}) == ["computed once", "found"]
    other = AutoModelForCausalLM.from_pretrained(world.base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 1.5
    other.save_pretrained(here / "base")
    for file in world.base.glob("*token*"):
        (here / "base" / file.name).write_bytes(file.read_bytes())
    assert how("another base", model={"base": str(here / "base")}) == new


def test_every_figure_is_the_same_for_every_batch_size(world, here):
    """With one, three, eight or nine pairs a step, and as many in a row; simpo, which tells them apart untrained."""
    records = []
    for examples, row_tokens in ((1, 1), (3, 180), (8, 480), (9, 4096)):
        batch = {"examples": examples, "row_tokens": row_tokens}
        run = train(world, here, f"{examples}", batch=batch, train={"steps": 1}, dpo={"loss": "simpo"})
        records.append(metrics(run, "eval")[0])
    for record in records:
        assert 0 < record["accuracy"] < 1
        assert record["accuracy"] == records[0]["accuracy"]
        assert flat(record) == pytest.approx(flat(records[0]), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "section",
    [pytest.param({"batch": {"row_tokens": 1}}, marks=pytest.mark.slow), {"model": {"layout": "padded"}}],
    ids=str,
)
def test_accuracy_stays_the_same_while_it_trains(world, here, finished, section):
    """Whatever the rows: updates differ by rounding alone."""
    run = train(world, here, **section)
    for found, reference in zip(metrics(run, "eval"), metrics(finished, "eval"), strict=True):
        assert found["accuracy"] == reference["accuracy"]
        assert flat(found) == pytest.approx(flat(reference), rel=1e-3, abs=1e-3)
