"""Reward and DPO on published preferences and a real (small) base model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from world import World, align, lines, metrics

from align import dpo, reward

SHARED = Path(__file__).parents[3] / "shared"
BASE, DATA = SHARED / "models" / "stories260k", SHARED / "data"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="the shared models and data are not here")

RUNS = {
    "hh": (reward, "hh_harmless/rows_0_1499.jsonl", {}),
    "ultrafeedback": (reward, "ultrafeedback/train_clean.jsonl", {"centring": 0.01}),
    "sigmoid": (dpo, "hh_harmless/rows_0_1499.jsonl", {}),
    "cached": (dpo, "llamafactory/dpo_en_demo.json", {"reference": "cached"}),
    "simpo": (dpo, "llamafactory/dpo_zh_demo.json", {"loss": "simpo"}),
    "kto": (dpo, "llamafactory/kto_en_demo.json", {"loss": "kto"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_real_set_trains_and_accounts_for_every_row(name, here):
    stage, file, section = RUNS[name]
    own = stage.__name__.removeprefix("align.")
    path = DATA / file
    if not path.is_file():
        pytest.skip(f"{file} is not here")
    recipe = World(here).preferences(
        here / "recipe.yaml",
        stage,
        model={"base": str(BASE)},
        data={
            "train": [{"path": str(path), "limit": 120}],
            "eval": {"fraction": 0.1, "max_rows": 8},
            "max_length": 400,
            "overlong": "drop",
            "invalid": "drop",
        },
        batch={"examples": 4, "row_tokens": 1024},
        optim={"learning_rate": 1e-3},
        train={"steps": 3, "eval_every": None},
        **{own: section},
    )
    told = align(recipe, stage=stage)
    assert told.status == 0, told.err
    run = here / "run"
    before, *trained, after = metrics(run)
    assert all(math.isfinite(record["loss"]) for record in (before, *trained, after))
    assert before["loss"] != after["loss"]
    if name in ("sigmoid", "cached"):
        assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    data, ledger = json.loads((run / "data.json").read_text()), lines(run / "ledger.jsonl")
    dropped = [entry for entry in ledger if entry["action"] == "dropped"]
    read = int(re.search(r"([\d,]+) rows read", told.out)[1].replace(",", ""))
    assert read == 120
    assert data["train"]["examples"] + data["eval"]["examples"] + len(dropped) == read
    assert all(entry["file"] == str(path) and entry["reason"] for entry in ledger)
