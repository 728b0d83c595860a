"""Folders of tools: only what a tool wrote is its own, and what stands in it is read as data of a stranger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from evaluations import evaluated, trained
from evaluations import recipe as comparison
from world import align, tree, write_rows

from align import compare, evaluate, pipeline


def an_evaluation(world) -> dict:
    write_rows(Path("responses.jsonl"), [{"prompt": "Say a"}])
    model = {"base": str(world.base), "dtype": "float32"}
    return {"stage": "evaluate", "model": model, "data": {"train": [{"path": "responses.jsonl"}]}}


def a_comparison(_world) -> dict:
    runs = [{"path": str(evaluated(Path(name), prompts=3, samples=2))} for name in ("../a", "../b")]
    return {"stage": "compare", "compare": {"runs": runs, "resamples": 200}}


def a_pipeline(world) -> dict:
    stage = {"stage": "sft", "model": {"base": str(world.base)}, "data": {"train": [{"path": str(world.talks)}]}}
    return {"stage": "pipeline", "accelerate": None, "stages": {"one": stage}}


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    ("tool", "made", "name"),
    [
        (evaluate, an_evaluation, "recipe.yaml"),
        (compare, a_comparison, "recipe.yaml"),
        (pipeline, a_pipeline, "pipeline.yaml"),
    ],
)
def test_the_folder_of_a_users_own_recipe_is_left_alone(world, here, monkeypatch, tool, made, name, fresh):
    """Its files have the names of results, and its recipe says that the results are to lie there."""
    (here / "mine").mkdir()
    monkeypatch.chdir(here / "mine")
    Path(name).write_text("# my notes\n" + yaml.safe_dump(made(world) | {"run": "."}))
    Path("report.html").write_text("mine")
    before = tree(Path())
    told = align(name, *fresh, stage=tool)
    assert told.status == 2
    assert f"(no {name} that a{'n' if tool is evaluate else ''} " in told.err
    assert tree(Path()) == before


DEEP, LONG = "[" * 100_000, "1" * 6000


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("evaluation.json", content) for content in ("", "[]", DEEP, LONG, '{"stage": ' + DEEP)),
        *(("responses.jsonl", content) for content in (DEEP, LONG)),
        ("evaluation.json", {"training": trained("dpo") | {"peak_memory_bytes": 10**400}}),
        ("responses.jsonl", {"tokens": 10**400}),
    ],
)
def test_an_evaluation_of_any_content_is_a_line(here, file, content):
    folders = [evaluated(here / name, prompts=3, samples=2) for name in "ab"]
    path = folders[1] / file
    if isinstance(content, dict):
        first, *rest = path.read_text().splitlines()
        content = "\n".join([json.dumps(json.loads(first) | content), *rest])
    path.write_text(content)
    told = align(*comparison(here / "c.yaml", *folders), stage=compare)
    assert told.status == 2
    assert told.err.startswith(f"{path}:")
    assert len(told.err.splitlines()) == 1


def test_half_a_character_of_an_evaluation_is_shown_as_its_escape(here):
    folders = [evaluated(here / name, prompts=3, samples=2, sampling={"a": "\ud800"}) for name in "ab"]
    told = align(*comparison(here / "c.yaml", *folders), stage=compare)
    assert (told.status, told.err) == (0, "")


def test_a_damaged_record_of_a_pipeline_is_none(world, here):
    """So the stage's folder is a stranger's; nothing is written over."""
    Path("p.yaml").write_text(yaml.safe_dump(a_pipeline(world) | {"run": "p"}))
    made = yaml.safe_load(Path("p.yaml").read_text())
    made["stages"]["one"] |= {"train": {"steps": 1}, "lora": {"r": 2}, "log": {"trackers": []}}
    Path("p.yaml").write_text(yaml.safe_dump(made))
    assert align("p.yaml", stage=pipeline).status == 0
    file = Path("p/stages/one.json")
    good = json.loads(file.read_text())
    for damage in ({"made_of": None}, {"made_of": {}}, {"over": [1]}, {"made_of": good["made_of"] | {"inputs": None}}):
        file.write_text(json.dumps(good | damage))
        told = align("p.yaml", "--dry-run", stage=pipeline)
        assert told.status == 2
        assert "holds what this pipeline did not make" in told.err
    file.write_text(DEEP)
    assert align("p.yaml", "--dry-run", stage=pipeline).status == 2
