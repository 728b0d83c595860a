"""Cases of real reports: what a reward is given, and measures that one class alone does not have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from world import align, lines

from align import classify, ppo

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260k"
pytestmark = pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="the shared cases are not here")


@pytest.fixture
def case(here, request):
    """A copy of the case, to work in."""
    folder = SHARED / "cases" / request.param
    for path in folder.iterdir():
        shutil.copyfile(path, here / path.name)
    return here


seen: list[tuple[str, str]] = []


def look(prompts, responses, rows):
    """Keeps the texts that it is given."""
    seen.extend(zip(prompts, responses, strict=True))
    return [0.0] * len(responses)


@pytest.mark.parametrize("case", ["lost-blank"], indirect=True)
def test_prompt_and_response_are_the_decoded_whole(case):
    """With the blank between them, which the decoder alone would drop."""
    seen.clear()
    rewards = "ppo.rewards=[{function: 'test_cases_borders:look', name: look}]"
    told = align(case / "recipe.yaml", f"model.base={STORIES}", rewards, stage=ppo)
    assert told.status == 0, told.err
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    asked = [row["text"] for row in lines(case / "d.jsonl")]
    assert {prompt for prompt, _ in seen} <= set(asked)
    assert len(seen) == 4
    whole = [prompt + response for prompt, response in seen]
    assert [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in whole] == whole
    assert any(response.startswith(" ") for _, response in seen)


@pytest.mark.parametrize("case", ["one-class-test"], indirect=True)
def test_what_one_class_does_not_have_is_null(case):
    told = align(case / "recipe.yaml", f"model.base={STORIES}", stage=classify)
    assert told.status == 0, told.err
    run = case / "runs" / "x"
    for path in (*run.rglob("*.json"), *run.rglob("*.jsonl")):
        for text in path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]:
            json.loads(text, parse_constant=pytest.fail)
    (last,) = (record for record in lines(run / "metrics.jsonl") if record["split"] == "test")
    assert last["auroc"] is None
    figures = json.loads((run / "classification.json").read_text("utf-8"))["splits"]
    assert figures["eval"]["figures"]["auroc"] is figures["eval"]["figures"]["auprc"] is None
