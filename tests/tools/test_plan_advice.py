"""What a plan says to change: followed as it is written, the run fits, and nothing is given up that need not be."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import yaml

from align.plan import read
from align.tools.plan.advice import advice, largest_rollout
from align.training.planning.devices import Device
from align.training.planning.memory import memory
from align.training.planning.parts import setting

MB = 10**6
SHAPE = {  # 127 million weights in 40 layers
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376,
    "num_hidden_layers": 40, "num_attention_heads": 8, "vocab_size": 512, "dtype": "bfloat16",
}  # fmt: skip
SHOWN = {"log": {"samples": ["And?"]}, "train": {"steps": 1, "generate": {"max_rows": 8}}}
WHOLE = {"stage": "dpo", "lora": None}
CLASSES = {"stage": "classify", "lora": None, "classify": {"train": "all", "labels": ["a", "b"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return str(folder)


@pytest.mark.parametrize(
    ("sections", "processes", "megabytes", "words"),
    [
        ({}, 8, 150, "train.shard=layers"),
        (SHOWN, 8, 150, "train.shard=layers 'log.samples=[]' train.generate=null"),
        ({}, 2, 110, "train.shard=layers model.quantize=8bit"),
        (WHOLE, 1, 2300, "dpo.reference=cached"),
        (CLASSES, 1, 500, "lora.r=16 classify.train=lora"),
    ],
    ids=["shards", "nothing shown", "shards of 8 bits", "no copy", "a LoRA"],
)
def test_what_is_advised_fits_once_it_is_done(base, tmp_path, sections, processes, megabytes, words):
    recipe = {
        "stage": "sft",
        "run": "run",
        "model": {"base": base, "gradient_checkpointing": True},
        "lora": {"r": 2},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64},
        "batch": {"examples": 8, "row_tokens": 64},
        "train": {"steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | sections))
    device = Device("a GPU", "cuda", megabytes * MB, torch.bfloat16, None, None, None)
    at = setting(read(str(path), []), device, processes)
    plan = memory(at)
    assert plan.peak.bytes > device.memory
    changes, mended = advice(at, plan, None)
    assert " ".join(change.words for change in changes) == words
    again = memory(setting(read(str(path), shlex.split(words)), device, processes))
    assert again.peak == mended.peak
    assert again.peak.bytes <= device.memory


def test_the_largest_rollout_is_the_last_that_fits(base, tmp_path):
    """Of 2 GB; a search stops within a thirty-second."""
    recipe = {
        "stage": "ppo",
        "run": "run",
        "model": {"base": base},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64},
        "batch": {"examples": 8},
        "train": {"steps": 1},
        "ppo": {
            "rewards": [{"function": "align.training.rules:sentiment"}],
            "samples": 4,
            "generation": {"max_new": 64},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    device = Device("a GPU", "cuda", 2000 * MB, torch.bfloat16, None, None, None)
    at = setting(read(str(path), []), device, 1)
    most = largest_rollout(at, None)
    assert most % 4 == 0
    assert most >= 32

    def held(episodes):
        wider = setting(read(str(path), [f"batch.cache_tokens={episodes * 128}"]), device, 1)
        load = memory(wider).load._replace(episodes=episodes)
        return next(moment.bytes for moment in memory(wider, load=load).moments if moment.name == "sampling")

    assert held(most) <= device.memory < held(most + max(4, most // 16))
