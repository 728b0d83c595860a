"""Small inputs on which runs went wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from world import World, align, tree

SHARED = Path(__file__).parents[3] / "shared"
CASES, BASE = SHARED / "cases", SHARED / "models" / "stories260k"
pytestmark = pytest.mark.skipif(not (CASES.is_dir() and BASE.is_dir()), reason="the shared cases are not here")


def test_changed_data(here):
    """Six rows, stopped after a step; then the file has two. And the same of a finished run."""
    file, run = here / "d.jsonl", here / "run"
    recipe = World(here).recipe(
        here / "recipe.yaml",
        model={"base": str(BASE)},
        data={"train": [{"path": "d.jsonl"}], "eval": {"sources": []}},
        batch={"examples": 2, "row_tokens": 256},
        train={"steps": 2, "save_every": 1},
    )
    for finished in (True, False):
        shutil.copy(CASES / "changed-data" / "before.jsonl", file)
        assert align(recipe).status == 0
        if not finished:  # as a signal after its first step leaves it
            shutil.rmtree(run / "final")
            shutil.rmtree(run / "checkpoints" / "step-000002")
        shutil.copy(CASES / "changed-data" / "d.jsonl", file)
        before = tree(run)
        told = align(recipe)
        assert told.status == 2
        assert "train: 6 examples there, 2 here, d.jsonl has changed (282 bytes there, 94 here)" in told.err
        assert all(way in told.err for way in ("Restore what changed", "train.start_from=", "--fresh"))
        assert tree(run) == before
    assert align(recipe, "run=second", "train.start_from=run").status == 0
