"""`align.prepare` where it takes long: killed processes, very large rows, many planted copies, Ray."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from often import REPEATS, repeated
from world import Child, align, lines, tree, write_rows

from align import prepare

pytestmark = repeated
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_prepare", BENCHMARKS / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(folder: Path, source: Path, **more) -> Path:
    filled = {
        "stage": "prepare",
        "run": str(folder / "set"),
        "sources": [{"path": str(source)}],
        "prepare": {"deduplicate": {"near": {}}, "filter": {"min_words": 3}, "privacy": {}},
        "output": {"shard_rows": 400, "split": {"eval": 0.1}},
        "card": False,
        "workers": 1,
        **more,
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(filled))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "rows.jsonl"
    benchmark().write(path, 6000)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != "recipe.yaml"}


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    told = align(recipe(folder, rows), stage=prepare)
    assert told.status == 0, told.err
    return files_of(folder / "set")


def test_several_workers_make_the_same_bytes(rows, whole, here):
    told = align(recipe(here, rows, workers=4), stage=prepare)
    assert told.status == 0, told.err
    assert files_of(here / "set") == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_any_time(rows, whole, here, workers):
    path, rng, kills = recipe(here, rows, workers=workers), random.Random(workers), 0
    for _ in range(12 * REPEATS):
        child = Child(here, path, stage=prepare)
        ready = time.monotonic() + rng.uniform(0.2, 3.0)
        if not child.send_when(signal.SIGKILL, lambda ready=ready: time.monotonic() > ready):
            assert child.wait().status == 0
            break
        kills += 1
    told = align(path, stage=prepare)
    assert told.status == 0, told.err
    assert kills
    assert files_of(here / "set") == whole


def test_a_row_of_50_mb(here):
    words = "the harbour lay still in the morning light and nobody came to see it " * 750_000
    small = [{"text": " ".join(f"w{i * k}" for k in range(1, 20))} for i in range(1, 6)]
    write_rows(here / "rows.jsonl", [*small, {"text": words}, *small[:2]])
    path = recipe(here, here / "rows.jsonl", prepare={"deduplicate": {"near": {}}}, output={"format": "jsonl"})
    told = align(path, stage=prepare)
    assert told.status == 0, told.err
    kept = [len(row["text"]) for row in lines(here / "set" / "train" / "text-00000.jsonl")]
    assert (len(kept), max(kept)) == (6, len(words))


def test_planted_copies_are_found(here):
    bench = benchmark()
    bench.write(here / "rows.jsonl", 100_000)
    steps = {"deduplicate": {"exact": "off", "near": {}}}
    path = recipe(here, here / "rows.jsonl", prepare=steps, output={"keep": ["family", "copy"]})
    told = align(path, stage=prepare)
    assert told.status == 0, told.err
    found = bench.found(here, here / "rows.jsonl")
    assert found["recall"] >= 0.95, found
    assert found["precision"] >= 0.95, found
    manifest = json.loads((here / "set" / "manifest.json").read_text())
    assert manifest["records"] == 100_000


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_makes_the_same_bytes(rows, whole, here):
    told = align(recipe(here, rows, engine="ray"), stage=prepare)
    assert told.status == 0, told.err
    assert files_of(here / "set") == whole
    assert "ray" in sys.modules
