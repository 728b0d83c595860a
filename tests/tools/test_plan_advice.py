"""What a plan says to change: followed as it is written, the run fits, and nothing is given up that need not be."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import yaml

from align.plan import read
from align.tools.plan.advice import advice
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
