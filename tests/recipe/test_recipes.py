"""Every recipe that is shipped is a valid one of its stage."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from align.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipe_parses(path):
    stage = yaml.safe_load(path.read_text(encoding="utf-8"))["stage"]
    recipe = load_recipe(path, [], import_module(f"align.{stage}").Recipe)
    assert recipe.stage == stage
