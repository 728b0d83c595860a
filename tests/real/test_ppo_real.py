"""PPO on a real base LM of 260,000 weights: a rule's reward rises on held-out beginnings, near the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from world import align, metrics

from align import ppo

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
BEGINNINGS = [
    f"{who} {what}"
    for who in ("Once upon a time", "One day", "In the park", "At home", "The big dog", "A cat")
    for what in ("there was", "saw a", "wanted to", "was very")
]


def names_a_girl(prompts, responses, rows):
    """1 where somebody is a she."""
    return [float(" she " in f" {response} ".lower()) for response in responses]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared model is not here")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rule_is_learnt(here, seed):
    (here / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in BEGINNINGS))
    recipe = {
        "stage": "ppo",
        "run": str(here / "run"),
        "seed": seed,
        "model": {"base": str(STORIES), "dtype": "float32"},
        "lora": {"r": 8, "alpha": 16},
        "data": {"train": [{"path": str(here / "prompts.jsonl")}], "eval": {"fraction": 0.25}},
        "batch": {"examples": 8},
        "optim": {"learning_rate": 2e-3, "warmup": 2},
        "train": {"steps": 20, "eval_every": 20},
        "log": {"trackers": []},
        "ppo": {
            "rewards": [{"function": "test_ppo_real:names_a_girl"}],
            "samples": 4,
            "generation": {"max_new": 24},
            "eval_samples": 16,
            "kl_coef": 0.02,
        },
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = align(here / "recipe.yaml", stage=ppo)
    assert told.status == 0, told.err
    before, after = (record for record in metrics(here / "run") if record["split"] == "eval")
    assert before["kl"] == 0
    assert after["score_low"] > before["score_high"]
    assert after["kl"] < 10
