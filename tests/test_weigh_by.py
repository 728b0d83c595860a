"""Sources that a stage mixes by tokens: what is told, exact resume, and that another way of weighing is another run."""

from __future__ import annotations

import pytest
from world import align, metrics

OPTIM = {"learning_rate": 1e-3, "schedule": "constant", "warmup": 0}


@pytest.mark.slow
def test_a_run_weighed_by_tokens_says_its_shares_and_goes_on_exactly(world, here):
    data = {
        "train": [{"path": str(world.talks), "weight": 3}, {"path": str(world.texts), "weight": 1}],
        "weigh_by": "tokens",
    }  # fmt: skip
    recipe = world.recipe(here / "recipe.yaml", data=data, optim=OPTIM, log={"trackers": []})
    whole = align(recipe, f"run={here / 'whole'}", "train.steps=6", "train.save_every=3")
    assert whole.status == 0, whole.err
    shares = [line for line in whole.out.splitlines() if "of the tokens wanted" in line]
    assert ["75.0 % of the tokens wanted" in line for line in shares] == [True, False]
    assert align(recipe, f"run={here / 'parts'}", "train.steps=3").status == 0
    longer = align(recipe, f"run={here / 'parts'}", "train.steps=6", "--extend")
    assert longer.status == 0, longer.err
    assert [line["loss"] for line in metrics(here / "parts", "train")] == [
        line["loss"] for line in metrics(here / "whole", "train")
    ]
    other = align(recipe, f"run={here / 'whole'}", "train.steps=6", "data.weigh_by=rows")
    assert other.status == 2
    assert "data.weigh_by" in other.err
