"""Rows judged by a model: perplexity and the probability of a class are those of plain transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from data.preparing.items import pair, text
from models.tiny import VOCABULARY, save_base, tiny_model, tiny_tokenizer
from results import KINDS, LABELS, save_result
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from world import align, lines, write_rows

from align import prepare
from align.recipe.errors import UserError
from align.recipe.preparing.filters import Filter, Perplexity, Score
from align.recipe.schema import Lora
from align.tools.preparing.scores import PerplexityStep, ScoreStep, scorers

TEXTS = ["a", "the harbour lay still", "nobody came. " * 9, "7 boats, 3 nets", "", "水"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A language model, one whose every token is as likely, a classifier as a whole model, and one as an adapter."""
    folder = tmp_path_factory.mktemp("scores")
    even = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        even.lm_head.weight.zero_()
    base = save_base(folder / "base")
    return {
        "base": base,
        "even": save_base(folder / "even", model=even),
        "whole": save_result(base, folder / "whole", "classify", *KINDS["classify"], None),
        "adapter": save_result(base, folder / "adapter", "classify", *KINDS["classify"], Lora(r=2, alpha=4)),
    }


def by_transformers(folder, texts, most, dtype):
    """exp of the mean negative log-likelihood of all tokens but the first, one text at a time."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), []
    for said in texts:
        ids = tiny_tokenizer()(said, return_tensors="pt", add_special_tokens=False).input_ids[:, :most]
        with torch.no_grad():
            found.append(model(ids, labels=ids).loss.exp().item() if ids.shape[1] > 1 else np.inf)
    return found


@pytest.mark.parametrize("most", [512, 5])
def test_perplexity_is_that_of_plain_transformers(made, most):
    step = PerplexityStep(Perplexity(model=str(made["base"]), max=9, max_length=most))
    found = step.numbers([text(said, i) for i, said in enumerate(TEXTS)])
    dtype = step.trunk.plain.dtype  # bfloat16 where the machine computes in it
    assert (found[0], found[4]) == (np.inf, np.inf), "nothing is known of what comes first"
    wanted = by_transformers(made["base"], TEXTS, most, dtype)
    assert found == pytest.approx(wanted, rel=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_where_every_token_is_as_likely_perplexity_is_the_size_of_the_vocabulary(made):
    step = PerplexityStep(Perplexity(model=str(made["even"]), max=9))
    assert step.numbers([text(TEXTS[1]), text(TEXTS[2])]) == pytest.approx([VOCABULARY] * 2)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_score_is_the_probability_that_transformers_gives(made, kind):
    step = ScoreStep(Score(classifier=str(made[kind]), label="spam", min=0.5), "filter.scores.0")
    said = [each for each in TEXTS if each]
    found = step.numbers([text(each) for each in said])
    assert found == pytest.approx(step.classifier.probabilities(said)[:, LABELS.index("spam")])
    assert len(set(np.round(found, 3))) > 2, "texts differ"
    if kind == "whole":
        model = AutoModelForSequenceClassification.from_pretrained(made[kind], dtype=torch.float32).eval()
        for each, probability in zip(said, found, strict=True):
            ids = tiny_tokenizer()(each, return_tensors="pt", add_special_tokens=False).input_ids[:, :32]
            with torch.no_grad():
                assert probability == pytest.approx(model(ids).logits.softmax(-1)[0, 1].item(), abs=1e-4)


def test_a_score_reads_the_whole_row_or_what_the_assistant_says(made):
    row = pair("Why?", "Because.", "No.")
    for on, said in (("all", "Why?\n\nBecause.\n\nNo."), ("answers", "Because.\n\nNo.")):
        step = ScoreStep(Score(classifier=str(made["whole"]), label="ham", min=0.5, on=on), "filter.scores.0")
        assert step.numbers([row]) == pytest.approx(step.classifier.probabilities([said])[:, 0])


def test_bounds_come_before_shares_and_ties_keep_the_earlier_row(made):
    step = scorers(Filter(perplexity=Perplexity(model=str(made["even"]), min=2, max=50, keep=0.5)))[0]
    number = np.array([1.0, 9, 3, 3, 60, 5, 3, np.inf])
    alive = np.arange(8) != 2
    drop = step.decide({"number": number}, alive, np.arange(8)).drop
    assert drop.tolist() == [1, 3, 0, 0, 2, 3, 0, 2], "of 9, 3, 5 and 3 the lowest two stay"
    best = ScoreStep(Score(classifier=str(made["whole"]), label="ham", keep=0.4), "filter.scores.0")
    assert best.decide({"number": number[:5]}, alive[:5] | True, np.arange(5)).drop.tolist() == [3, 0, 3, 3, 0]


def test_a_set_without_the_rows_that_models_judge_badly(made, here):
    rows = [{"text": f"{said} {i}"} for i, said in enumerate(TEXTS * 3)] + [{"text": "a"}]  # one token: no perplexity
    write_rows(here / "rows.jsonl", rows)
    measured = PerplexityStep(Perplexity(model=str(made["base"]), max=9))
    numbers = measured.numbers([text(row["text"]) for row in rows])
    most = float(np.median(numbers[:-1]))
    recipe = {
        "stage": "prepare", "run": "set", "sources": [{"path": "rows.jsonl"}], "workers": 1, "card": False,
        "prepare": {"filter": {
            "perplexity": {"model": str(made["base"]), "max": most},
            "scores": [{"classifier": str(made["whole"]), "label": "ham", "keep": 0.5}],
        }},
        "output": {"format": "jsonl"},
    }  # fmt: skip
    (here / "data.yaml").write_text(yaml.safe_dump(recipe))
    told = align(here / "data.yaml", stage=prepare)
    assert told.status == 0, told.err
    low = [row["text"] for row, number in zip(rows, numbers, strict=True) if number <= most]
    likely = measured_by(made["whole"], low)
    best = sorted(np.argsort(-likely, kind="stable")[: round(len(low) / 2)])
    assert [row["text"] for row in lines(here / "set/train/text-00000.jsonl")] == [low[i] for i in best]
    steps = {step["name"]: step for step in json.loads((here / "set/manifest.json").read_text())["steps"]}
    assert steps["filter.perplexity"]["dropped"] == {f"perplexity above {most}": len(rows) - len(low)}
    assert steps["filter.perplexity"]["found"]["quantiles_0_10_50_90_100"][2] == pytest.approx(most, rel=1e-5)
    assert sum(steps["filter.scores.0"]["dropped"].values()) == len(low) - len(best)


def measured_by(classifier, texts):
    step = ScoreStep(Score(classifier=str(classifier), label="ham", min=0), "filter.scores.0")
    return step.numbers([text(said) for said in texts])


def test_what_cannot_judge_is_told(made, here):
    for classifier, label, told in (
        (made["whole"], "eggs", "filter.scores.0.label: expected one of ham, spam, found 'eggs'"),
        (made["base"], "ham", "filter.scores.0.classifier"),
        (here / "nowhere", "ham", "filter.scores.0.classifier"),
    ):
        with pytest.raises(UserError, match=told.replace(".", r"\.")):
            ScoreStep(Score(classifier=str(classifier), label=label, min=0.5), "filter.scores.0")
