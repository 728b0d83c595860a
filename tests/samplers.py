"""What tests of GRPO and distillation start from: recipes for the prompts of pairs, and a teacher."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ppo_start import MOST, TRAIN, Start
from world import World, align

from align import distill, grpo, sft

OWN = {
    grpo: {"rewards": [{"function": "ppo_start:wordy"}], "samples": 3},
    distill: {"samples": 2},
}


def recipe_of(world: World, start: Start, path: Path, stage: ModuleType, own: dict[str, Any] | None = None, **sections):
    """A recipe of `stage`, whose own section is merged from `own`; a distillation's teacher stands beside `start`."""
    name = stage.__name__.removeprefix("align.")
    section = {"generation": {"max_new": MOST}} | OWN.get(stage, {})
    if stage is distill:
        section["teacher"] = {"adapter": str(start.base.parent / "teacher" / "final")}
    held = {"sources": [{"path": str(world.held_pairs), "limit": 3}]}
    data = {"train": [{"path": str(world.pairs)}], "eval": held} | sections.pop("data", {})
    model = {"base": str(start.base)} | sections.pop("model", {})
    common = {"stage": name, "run": str(path.with_suffix("")), "train": TRAIN, "batch": {"examples": 3}}
    return world.recipe(path, data=data, model=model, **common | {name: section | (own or {})} | sections)


def make_teacher(world: World, start: Start, cache: Path) -> Path:
    """`final/` of a LoRA that has learnt talks on the base of `start`; made once for all files of tests."""
    folder = start.base.parent / "teacher"
    if (folder / "final").exists():
        return folder / "final"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        section = {"model": {"base": str(start.base)}, "train": {"steps": 6, "eval_every": None, "save_every": None}}
        recipe = world.recipe(start.base.parent / "teacher.yaml", run=str(folder), data={"eval": {}}, **section)
        told = align(recipe, stage=sft)
    assert told.status == 0, told.err
    return folder / "final"
