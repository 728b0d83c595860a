"""Compiled layers change no loss. Slow to start, so on a real (small) model alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from world import World, align, metrics, write_rows

BASE = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="the shared models are not here")


def test_compiled_layers_give_the_same_losses(here):
    """Four steps of batches of several lengths, to 1e-5."""
    text = "Once upon a time there was a little cat who liked to play in the garden with her friends."
    rows = write_rows(here / "rows.jsonl", [{"text": text[: 20 + 6 * i]} for i in range(12)])
    losses = {}
    for compiled in (False, True):
        recipe = World(here).recipe(
            here / f"{compiled}.yaml",
            run=str(here / f"{compiled}"),
            model={"base": str(BASE), "compile": compiled},
            data={"train": [{"path": str(rows)}], "eval": {}},
            batch={"examples": 3},
            optim={"learning_rate": 1e-3},
            train={"steps": 4, "eval_every": None, "save_every": None},
        )
        told = align(recipe)
        assert told.status == 0, told.err
        losses[compiled] = [record["loss"] for record in metrics(here / f"{compiled}", "train")]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert len(set(losses[False])) == 4
