"""The reward model through its command, on a model of 40,000 weights: what it leaves, scores and learns."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations, pairwise
from statistics import fmean, stdev

import pytest
from plain import Scorer, merged
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from world import align, flat, lines, metrics, pair, tree, weights, write_rows

from align import reward

TRAIN = {"steps": 8, "eval_every": 4}
FULL = {"lora": None, "optim": {"learning_rate": 0.003}}


def train(world, here, name="run", **sections):
    """Train by a recipe with these sections; the run's folder."""
    recipe = world.preferences(here / f"{name}.yaml", reward, run=str(here / name), **{"train": TRAIN} | sections)
    told = align(recipe, stage=reward)
    assert (told.status, told.err) == (0, ""), told.err
    return here / name


@pytest.fixture(scope="module")
def finished(world, cache, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        return train(world, tmp_path_factory.mktemp("finished"))


def row_scores(scorer, rows):
    """For each row the scores of its answers, the best first."""
    answers = [row.get("answers") or [row["chosen"], row["rejected"]] for row in rows]
    return [[scorer.score(row["prompt"], said) for said in given] for row, given in zip(rows, answers, strict=True)]


def share(values, edges):
    """The share of values in each bin, the lower edge inside."""
    ends = [-math.inf, *edges, math.inf]
    return [fmean(low <= value < high for value in values) for low, high in pairwise(ends)]


def expected(scores, margins=None, centring=0.0):
    """The eval record of these (chosen, rejected) scores, by the formulas of the docs."""
    ahead = [c - r for c, r in scores]
    margins = margins or [0.0] * len(scores)
    sure = [1 / (1 + math.exp(-abs(m))) for m in ahead]
    bins = [
        [i for i, p in enumerate(sure) if low <= p < high] for low, high in pairwise((0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 2))
    ]
    losses = [
        math.log1p(math.exp(margin - m)) + centring * (c + r) ** 2
        for m, margin, (c, r) in zip(ahead, margins, scores, strict=True)
    ]
    return {
        "loss": fmean(losses),
        "accuracy": fmean(m > 0 for m in ahead),
        "margin": fmean(ahead),
        "score/chosen": fmean(c for c, _ in scores),
        "score/rejected": fmean(r for _, r in scores),
        "margin_share": share(ahead, reward.MARGINS),
        "calibration_confidence": [fmean(sure[i] for i in own) if own else None for own in bins],
        "calibration_accuracy": [fmean(ahead[i] > 0 for i in own) if own else None for own in bins],
    }


def assert_same(record, figures):
    """To 1e-5."""
    for name, figure in figures.items():
        found = record[name]
        if isinstance(figure, list):
            assert [f is None for f in found] == [f is None for f in figure], name
            found, figure = ([f for f in values if f is not None] for values in (found, figure))
        assert found == pytest.approx(figure, rel=1e-5, abs=1e-5), name


def test_exactly_these_files_are_left(finished):
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    final = ("adapter_config.json", "adapter_model.safetensors", "align.json", "base_config.json")
    tokenizer = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert set(tree(finished)) == {
        *("recipe.yaml", "environment.json", "data.json", "ledger.jsonl", "metrics.jsonl", "summary.json"),
        *("report.html", "samples.jsonl"),
        *(f"checkpoints/step-{step:06d}/{name}" for step in (6, 8) for name in checkpoint),
        *(f"final/{name}" for name in (*final, *tokenizer)),
    }


def test_every_record_has_every_figure(finished):
    both = {"step", "split", "loss", "accuracy", "margin", "score/chosen", "score/rejected"}
    held = {"accuracy_low", "accuracy_high", "margin_share", "calibration_confidence", "calibration_accuracy"}
    found = {(r["split"], r["step"]): set(r) for r in lines(finished / "metrics.jsonl")}
    assert set(found) == {*(("train", step) for step in range(1, 9)), *(("eval", step) for step in (0, 4, 8))}
    assert all(names >= both | (held if split == "eval" else {"grad_norm"}) for (split, _), names in found.items())
    for record in metrics(finished, "eval"):
        assert record["accuracy_low"] < record["accuracy"] < record["accuracy_high"]


def test_it_learns_which_answer_is_better(finished):
    """Three of the fourteen held-out pairs are the wrong way round: 11 / 14 is all of it."""
    first, *_, last = metrics(finished, "train")
    assert last["loss"] < first["loss"] / 2
    before, *_, after = metrics(finished, "eval")
    assert before["accuracy"] < after["accuracy"] == 11 / 14


def test_final_scores_what_the_run_scored(finished, world):
    """Loaded by plain transformers and peft: every figure of the last evaluation, and of align.json."""
    scorer = Scorer.load(finished / "final", world.base)
    assert_same(metrics(finished, "eval")[-1], expected(row_scores(scorer, lines(world.held_pairs))))
    best = [chosen for chosen, _ in row_scores(scorer, lines(world.pairs))]
    about = json.loads((finished / "final" / "align.json").read_text())
    assert {k: about[k] for k in ("stage", "role", "base", "score_rows")} == {
        "stage": "reward", "role": "adapter", "base": str(world.base), "score_rows": 21,
    }  # fmt: skip
    assert about["score_mean"] == pytest.approx(fmean(best), rel=1e-5)
    assert about["score_std"] == pytest.approx(stdev(best), rel=1e-4)


def test_a_score_depends_on_the_end_of_turn(finished, world):
    """`x` and `x` + end of turn differ: the score is read at the latter."""
    scorer = Scorer.load(finished / "final", world.base)
    before = Scorer.load(finished / "final", world.base)
    before.model.config.pad_token_id = before.tokenizer.pad_token_id  # transformers then reads the token before it
    assert (
        abs(
            scorer.score("Name the capital of Peru", "It is Lima.")
            - before.score("Name the capital of Peru", "It is Lima.")
        )
        > 1e-3
    )


def test_all_weights_are_trained_without_lora(world, here):
    run = train(world, here, **FULL)
    assert_same(
        metrics(run, "eval")[-1], expected(row_scores(Scorer.load(run / "final", None), lines(world.held_pairs)))
    )
    assert metrics(run, "eval")[-1]["accuracy"] == 11 / 14
    assert json.loads((run / "final" / "align.json").read_text())["role"] == "model"

    # As plain transformers load it, several rows at once: it pads with no end of turn, where the base does.
    model = AutoModelForSequenceClassification.from_pretrained(run / "final").eval()
    tokenizer, scorer = AutoTokenizer.from_pretrained(run / "final"), Scorer.load(run / "final", None)
    answers = ["Yes.", "It is a longer answer."]
    talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}] for answer in answers]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False).rstrip() for talk in talks]
    found = model(**tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    assert found == pytest.approx([scorer.score("Hi", answer) for answer in answers], abs=1e-4)
    assert set(weights(run)) >= {"score.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}


def test_an_sft_result_is_the_trunk_and_demonstrations_normalise(world, here):
    """On base + merged SFT adapter; mean and spread are those of the conversations' last answers."""
    few = {"train": {"steps": 2}, "data": {"eval": {"sources": []}}}
    sft = align(world.recipe(here / "sft.yaml", run=str(here / "sft"), **few))
    assert sft.status == 0, sft.err
    bad = write_rows(here / "bad.jsonl", [{"prompt": "Hi", "completion": "Go.", "label": False}])
    said = {"demonstrations": [{"path": str(world.talks)}, {"path": str(bad)}], "demonstration_rows": 100}
    on = {"model": {"adapter": str(here / "sft" / "final")}, "data": {"invalid": "drop"}}
    run = train(world, here, **on, train={"steps": 1}, reward=said)
    (lost,) = lines(run / "ledger.jsonl")
    assert (lost["file"], lost["action"]) == (str(bad), "dropped")
    summary = json.loads((run / "data.json").read_text())["summary"]
    assert "demonstrations: 29 rows read, 1 dropped (1 invalid), 0 truncated, 0 repaired, 0 exact duplicates" in summary
    base = AutoModelForSequenceClassification.from_pretrained(world.base, num_labels=1)
    base.model = merged(world.base, here / "sft" / "final").model
    scorer = Scorer.load(run / "final", base)
    assert_same(metrics(run, "eval")[-1], expected(row_scores(scorer, lines(world.held_pairs))))
    talks = [[turn["content"] for turn in row["messages"]] for row in lines(world.talks)]
    scores = [scorer.score(question, answer) for question, answer in talks]
    about = json.loads((run / "final" / "align.json").read_text())
    assert about["score_rows"] == len(scores) == 28
    assert about["score_mean"] == pytest.approx(fmean(scores), rel=1e-5)
    assert about["score_std"] == pytest.approx(stdev(scores), rel=1e-4)


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_margins_centring_and_ranked_lists(world, here, pairs):
    """The loss of pairs with and without a margin beside lists of three, over all their pairs or the adjacent ones; and
    of each of both files."""
    with_margin = [row | {"margin": 0.5 * i} if i else row for i, row in enumerate(lines(world.held_pairs)[:5])]
    ranked = [{"prompt": row["prompt"], "answers": [row["chosen"], "It.", row["rejected"]]} for row in with_margin]
    files = [write_rows(here / "pairs.jsonl", with_margin), write_rows(here / "ranked.jsonl", ranked)]
    data = {"eval": {"sources": [{"path": str(file), "title": file.stem} for file in files]}}
    section = {"pairs": pairs, "centring": 0.05}
    run = train(world, here, data=data, train={"steps": 1}, reward=section)
    scorer = Scorer.load(run / "final", world.base)
    scores = row_scores(scorer, with_margin)
    paired = pairwise if pairs == "adjacent" else lambda answers: combinations(answers, 2)
    lists = [couple for answers in row_scores(scorer, ranked) for couple in paired(answers)]
    margins = [0.5 * i for i in range(5)] + [0.0] * len(lists)
    assert len(lists) == (10 if pairs == "adjacent" else 15)
    record = metrics(run, "eval")[-1]
    assert_same(record, expected([*scores, *lists], margins, 0.05))
    for title, own in (("pairs", expected(scores, margins[:5], 0.05)), ("ranked", expected(lists, None, 0.05))):
        numbers = {name: figure for name, figure in own.items() if not isinstance(figure, list)}
        assert_same(record, {f"{name}/{title}": figure for name, figure in numbers.items()})


@pytest.mark.parametrize(
    ("examples", "row_tokens"), [(1, 1), pytest.param(3, 180, marks=pytest.mark.slow), (8, 480), (9, 4096)]
)
def test_every_figure_is_the_same_for_every_batch_size(world, here, finished, examples, row_tokens):
    """Of the untrained head, with one, three, eight or nine pairs a step, and as many in a row."""
    batch = {"examples": examples, "row_tokens": row_tokens}
    run = train(world, here, batch=batch, train={"steps": 1})
    (before, _), reference = metrics(run, "eval"), metrics(finished, "eval")[0]
    assert before["accuracy"] == reference["accuracy"] == 8 / 14
    assert_close(before, reference)


@pytest.mark.parametrize(
    "section",
    [{"batch": {"row_tokens": 1}}, pytest.param({"model": {"layout": "padded"}}, marks=pytest.mark.slow)],
    ids=str,
)
def test_accuracy_stays_the_same_while_it_trains(world, here, finished, section):
    """Steps differ by rounding alone, which this high rate of learning makes grow."""
    run = train(world, here, **section)
    for found, reference in zip(metrics(run, "eval"), metrics(finished, "eval"), strict=True):
        assert found["accuracy"] == reference["accuracy"]
        assert_close(found, reference, 1e-3)


def assert_close(record, reference, rel=1e-6):
    assert flat(record) == pytest.approx(flat(reference), rel=rel, abs=rel)


def test_show_marks_both_answers_and_trains_nothing(world, here):
    told = align(world.preferences(here / "recipe.yaml", reward), "--show", stage=reward)
    assert told.status == 0, told.err
    shown = re.findall(r"⟦(.*?)<\|im_end\|>⟧", told.out)
    assert len(shown) == 6  # of three examples
    first = pair("Name the capital of France", " Paris")
    assert {first["chosen"], first["rejected"]} <= set(shown)
    assert set(tree(here)) == {"recipe.yaml"}
