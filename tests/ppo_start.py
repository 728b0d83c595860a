"""What tests of PPO start from: a base that says something, a reward model on it, rewards that are rules, recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM
from world import align

from align import ppo, reward

SAMPLES, MOST = 2, 6
TRAIN = {"steps": 1, "eval_every": None, "save_every": None}
UNEVALUATED = {"eval": {"sources": []}}


def wordy(prompts, responses, rows):
    """Of the response's letters, its prompt and its row."""
    return [
        sum(map(str.isalpha, response)) / 10 + ("Cuba" in prompt) + len(row["chosen"]) / 100
        for prompt, response, row in zip(prompts, responses, rows, strict=True)
    ]


def watching(prompts, responses, rows):
    return [float(len(response)) for response in responses]


class Start(NamedTuple):
    """What PPO begins with."""

    base: Path
    reward: Path  # `final/` of a reward model on it


def make_start(world, cache, tmp_path_factory) -> Start:
    """The world's base with larger weights, so that its words differ and end; made once for all files of tests."""
    folder = tmp_path_factory.getbasetemp() / "ppo start"
    start = Start(folder / "base", folder / "reward" / "final")
    if start.reward.exists():
        return start
    model = AutoModelForCausalLM.from_pretrained(world.base)
    with torch.no_grad():
        for p in model.parameters():
            p *= 12 if p.ndim == 2 else 1
        model.lm_head.weight[model.config.eos_token_id] *= 4
    shutil.copytree(world.base, start.base)
    model.save_pretrained(start.base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        section = {"run": str(folder / "reward"), "model": {"base": str(start.base)}, "data": {"eval": {"sources": []}}}
        told = align(world.preferences(folder / "reward.yaml", reward, train=TRAIN, **section), stage=reward)
    assert told.status == 0, told.err
    return start


def recipe_of(world, start, path, ppo=None, **sections):
    """A recipe for the prompts of pairs, rewarded by the reward model alone; `ppo` and others merged into it."""
    own = {"rewards": [{"adapter": str(start.reward)}], "generation": {"max_new": MOST}, "samples": SAMPLES}
    held = {"sources": [{"path": str(world.held_pairs), "limit": 3}]}
    data = {"train": [{"path": str(world.pairs)}], "eval": held} | sections.pop("data", {})
    model = {"base": str(start.base)} | sections.pop("model", {})
    common = {"stage": "ppo", "run": str(path.with_suffix("")), "train": TRAIN}
    return world.recipe(path, ppo=own | (ppo or {}), data=data, model=model, **common | sections)


def ran(world, start, here, name="run", **sections):
    """The folder of a run by such a recipe."""
    told = align(recipe_of(world, start, here / f"{name}.yaml", **sections), stage=ppo)
    assert (told.status, told.err) == (0, ""), told.err
    return here / name
