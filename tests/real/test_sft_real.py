"""The stage on real data sets and a real (small) base model; and killed ten times on it."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from world import Child, World, align, lines, metrics, weights

SHARED = Path(__file__).parents[3] / "shared"
BASE = SHARED / "models" / "stories260k"
DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="the shared models and data are not here")

SETS = {
    "llamafactory/alpaca_en_demo.json": "alpaca",
    "sharegpt_zh/sharegpt_zh_1K_format.jsonl": "sharegpt",
    "llamafactory/v1_sft_demo.jsonl": "messages",
    "llamafactory/glaive_toolcall_en_demo.json": "sharegpt",
}
LIMIT = 512  # what the model can take


def recipe(here, name, **data):
    """Three steps on one set."""
    source = {"train": [{"path": str(DATA / name), "limit": 200}], "eval": {"fraction": 0.05, "max_rows": 8}}
    return World(here).recipe(
        here / "recipe.yaml",
        model={"base": str(BASE)},
        data=source | {"max_length": LIMIT} | data,
        batch={"examples": 4, "row_tokens": 1024},
        optim={"learning_rate": 5e-3},
        train={"steps": 3},
    )


@pytest.mark.parametrize("name", SETS)
def test_a_real_set_trains_and_accounts_for_every_row(name, here):
    told = align(recipe(here, name, overlong="drop", invalid="drop"))
    assert told.status == 0, told.err
    run = here / "run"
    assert f"{Path(name).name}: {SETS[name]} (" in told.out
    assert all(math.isfinite(record["loss"]) for record in metrics(run))
    data, ledger = json.loads((run / "data.json").read_text()), lines(run / "ledger.jsonl")
    dropped = [entry for entry in ledger if entry["action"] == "dropped"]
    read = int(re.search(r"([\d,]+) rows read", told.out)[1].replace(",", ""))
    assert data["train"]["examples"] + data["eval"]["examples"] + len(dropped) == read
    assert len({(entry["file"], entry["line"]) for entry in dropped}) == len(dropped)
    assert all(entry["file"] == str(DATA / name) and entry["reason"] for entry in ledger)


@pytest.mark.parametrize("name", SETS)
def test_a_real_set_is_refused_with_every_row_named(name, here):
    """With `error`, as many rows are refused as `drop` drops, and the first of them are named."""
    told = align(recipe(here, name, overlong="drop", invalid="drop"), "--show")
    assert told.status == 0, told.err
    count = {kind: int(n) for n, kind in re.findall(r"(\d+) (invalid|overlong)", told.out)}
    strict = align(recipe(here, name), "--show")
    assert strict.status == (2 if count else 0)
    if "overlong" in count:
        assert re.search(rf"\b{count['overlong']} rows? longer than data.max_length = {LIMIT} tokens", strict.err)
        assert re.search(re.escape(f"{DATA / name}:") + r"\d+ \(\d", strict.err)
    if "invalid" in count:
        assert re.search(rf"\b{count['invalid']} rows? cannot be taken", strict.err)
    cut = align(recipe(here, name, overlong="truncate", invalid="drop"), "--show")
    assert cut.status == 0, cut.err
    assert f" {count.get('overlong', 0)} truncated" in cut.out or "overlong" in cut.out


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(here):
    """Ten SIGKILLs leave the same numbers and weights, bit for bit, as none."""
    path = recipe(here, "llamafactory/alpaca_en_demo.json", overlong="drop")
    settings = ("train.steps=30", "train.save_every=2", "train.eval_every=7", "lora.dropout=0.1")
    child = Child(here, path, f"run={here / 'whole'}", *settings)
    began = time.monotonic()
    assert child.wait().status == 0
    length = time.monotonic() - began
    draw = random.Random()
    for _ in range(10):
        moment = time.monotonic() + draw.uniform(0.2, 0.7) * length
        child = Child(here, path, f"run={here / 'killed'}", *settings)
        if not child.send_when(signal.SIGKILL, lambda moment=moment: time.monotonic() > moment):
            break  # it came to its end before
        if (status := child.wait().status) != -signal.SIGKILL:
            assert status == 0  # it came to its end while the signal was on its way
            break
    assert Child(here, path, f"run={here / 'killed'}", *settings).wait().status == 0
    assert metrics(here / "killed") == metrics(here / "whole")
    assert all(torch.equal(tensor, weights(here / "killed")[n]) for n, tensor in weights(here / "whole").items())
