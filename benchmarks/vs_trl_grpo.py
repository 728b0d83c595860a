"""align.grpo beside TRL's GRPOTrainer: one run, same prompts, LoRA, dtype, threads, KL and reward.

    python benchmarks/vs_trl_grpo.py [--data FILE] [--threads 2] [--updates 3] [--rounds 1]

An update is 4 prompts of 16 to 192 tokens with 4 samples each, at most 48 new tokens, one epoch in one minibatch, with
the KL to the reference in the loss. The reward is a function that costs nothing. Each side runs in processes of its
own, in turn, TRL with the fastest of its settings, which are tried first: transformers' `generate` and its continuous
batching, 16 or 4 episodes in a micro-batch, adapters in float32 or bfloat16. The dtype is bfloat16 where the CPU has
AVX512, else float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from episodes import NEW, for_trl, lora, options, run_align, trained, written_prompts
from sides import HEADER, Sides, arguments, measured, run

SAMPLES, KL_COEF = 4, 0.04
SETTINGS = {  # episodes in one of TRL's micro-batches, the dtype of its adapters, and how it samples
    "16 at once": {"rows": 16},
    "4 at once": {"rows": 4},
    "16 at once, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16"},
    "4 at once, bfloat16 adapters": {"rows": 4, "adapters": "bfloat16"},
    "16 at once, continuous batching": {"rows": 16, "continuous": True},
    "16 at once, continuous batching, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16", "continuous": True},
}


def compare(args: argparse.Namespace, work: Path) -> None:
    spec = {"base": args.base, "dtype": args.dtype, "threads": args.threads, "work": str(work)}
    spec["prompts"] = measured(__file__, {**spec, "arm": "prepare", "prepare": str(args.data)})["prompts"]
    setting, (pairs,) = Sides(__file__, args, SETTINGS, spec, {}).side_by_side(2, SAMPLES)
    print(f"\n{HEADER}\n{pairs.row('4 prompts x 4 samples')}")
    line = {
        "benchmark": "vs_trl_grpo", "dtype": args.dtype, "ratio": pairs.ratio, "ratios": pairs.ratios,
        "memory_ratio": pairs.memory_ratio,
        "ours": {"episodes_per_second": pairs.mean(0), "peak_bytes": pairs.peak(0)},
        "peer": {"episodes_per_second": pairs.mean(1), "peak_bytes": pairs.peak(1), "setting": setting},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(line | ({"before": pairs.before()} if args.before else {})))


def worth(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Of each response: something that differs."""
    return [float(sum(map(ord, response)) % 7) for response in responses]


def own() -> dict:
    return {"rewards": [{"function": "vs_trl_grpo:worth"}], "kl_coef": KL_COEF}


def prepare(spec: dict) -> dict:
    return {"prompts": str(written_prompts(spec))}


def run_ours(spec: dict) -> dict:
    from align import grpo

    return run_align(spec, grpo, own())


def run_trl(spec: dict) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from align import grpo
    from align.models.base import base_folder

    given = for_trl(spec, grpo, own())
    tokenizer, lengths = given.tokenizer, list[float]()
    ids = tokenizer.apply_chat_template(given.talks, add_generation_prompt=True, return_dict=False)
    assert ids == given.ids, "both sides are asked the same"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def reward(completions: Sequence[list[dict]], completion_ids: Sequence[list[int]], **_more: object) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return worth([], [talk[0]["content"] for talk in completions], [])

    config = GRPOConfig(
        **options(spec), logging_steps=10**6, max_steps=spec["updates"], shuffle_dataset=False, beta=KL_COEF,
        num_generations=SAMPLES, max_completion_length=NEW,
        use_transformers_continuous_batching=spec["setting"].get("continuous", False),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base_folder(given.recipe.model), dtype=getattr(torch, spec["dtype"]))
    trainer = GRPOTrainer(
        model, reward, config, train_dataset=Dataset.from_dict({"prompt": given.talks}), processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )  # fmt: skip
    return {"episodes_per_second": trained(spec, trainer), "response_tokens": sum(lengths) / len(lengths)}


if __name__ == "__main__":
    run(arguments(__doc__, SETTINGS), {"prepare": prepare, "align": run_ours, "trl": run_trl}, compare)
