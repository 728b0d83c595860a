"""The controlled experiment: the world that its generator writes, and the recipe that runs in it."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import yaml
from world import align, lines, tree

from align import pipeline
from align.models.base import load_tokenizer
from align.recipe.schema import Model
from align.training.rules import VALENCES, sentiment

ROOT = Path(__file__).parents[1]
REVIEWS = ROOT / "data_templates" / "reviews"


def test_the_generator_writes_exactly_what_is_shipped(tmp_path):
    runpy.run_path(str(ROOT / "benchmarks" / "reviews.py"))["main"](tmp_path)
    assert tree(tmp_path) == tree(REVIEWS)
    assert sum(map(len, tree(REVIEWS).values())) < 400_000


def test_every_word_is_a_token_and_no_film_is_in_two_files():
    tokenizer = load_tokenizer(Model(base=str(REVIEWS)))
    reviews, prompts, held = (lines(REVIEWS / f"{name}.jsonl") for name in ("reviews", "prompts", "held_out"))
    for text in {row[key] for row in [*reviews, *prompts, *held] for key in row}:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    films = [{row["prompt"] for row in rows} for rows in (reviews, prompts, held)]
    assert sum(map(len, films)) == len(set.union(*films))
    assert (len(prompts), len(held)) == (len(films[1]), len(films[2])) == (400, 100)


def test_reviews_have_every_word_of_the_rule_and_the_stronger_are_the_rarer():
    reviews = [row["completion"] for row in lines(REVIEWS / "reviews.jsonl")]
    said = Counter(word for review in reviews for word in re.findall(r"\w+", review))
    often = Counter()
    for word, valence in VALENCES.items():
        assert said[word], word
        often[abs(valence)] += said[word]
    assert often[0.5] > 1.5 * often[1.0] > 3 * often[1.5]
    scores = sentiment([], reviews, [])
    assert abs(sum(scores) / len(scores)) < 0.2


@pytest.fixture(scope="module")
def plan():
    """What --dry-run says of the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        told = align("recipes/frontier.yaml", "run=runs/never", "--dry-run", stage=pipeline)
    assert (told.status, told.err) == (0, "")
    assert not (ROOT / "runs" / "never").exists()
    return told.out


SWEEPS = ("dpo", "dpo_second", "ppo_true", "ppo_learned", "grpo_true", "grpo_learned")


def test_the_recipe_is_six_sweeps_over_three_seeds(plan):
    kinds = Counter(line.split("[")[0].split(":")[0].strip() for line in plan.splitlines() if line.startswith("  "))
    for sweep in SWEEPS:
        assert kinds[sweep] == kinds[f"{sweep}_answers"] == 15, sweep
    assert (kinds["dpo_first"], kinds["dpo_pool"]) == (3, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_in_small_comes_to_its_table_and_figure(tmp_path, capsys, monkeypatch):
    """One point of each sweep, a few steps: every group has an answer, and the benchmark draws them."""
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "recipes" / "frontier.yaml").read_text("utf-8")) | {"run": str(tmp_path / "run")}
    for name, stage in recipe["stages"].items():
        stage["sweep"] = {key: values[:1] for key, values in stage.get("sweep", {}).items()}
        if "train" in stage:
            kept = {key: value for key, value in stage["train"].items() if key in ("save_every", "start_from")}
            stage["train"] = kept | {"steps": 250 if name == "base" else 2}
        if stage["stage"] == "evaluate":
            stage["evaluate"]["samples"] = 4
        for source in stage.get("data", {}).get("train", []):
            source["limit"] = 2000 if name == "base" else 12
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    told = align(path, stage=pipeline)
    assert told.status == 0, told.err
    compared = tmp_path / "run" / "compared" / "compare.json"
    monkeypatch.setattr("sys.argv", ["frontier.py", str(compared), "--figure", str(tmp_path / "frontier.svg")])
    runpy.run_path(str(ROOT / "benchmarks" / "frontier.py"))["main"]()
    points = json.loads(capsys.readouterr().out.splitlines()[-1])["points"]
    assert {point["group"] for point in points} == {*SWEEPS}
    assert all(len(point["kl"]) == 1 for point in points)
    assert (tmp_path / "frontier.svg").read_text().startswith("<?xml")
