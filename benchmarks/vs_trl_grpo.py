"""align.grpo beside TRL's GRPOTrainer: one run, same prompts, LoRA, dtype, threads, KL and reward.

    python benchmarks/vs_trl_grpo.py [--data FILE] [--threads 2] [--updates 4] [--rounds 2]

An update is 4 prompts of 16 to 192 tokens with 4 samples each, at most 48 new tokens, one epoch in one minibatch, with
the KL to the reference in the loss. The reward is a function that costs nothing. Each side runs in processes of its
own, in turn, TRL with the fastest of its settings, which are tried first: transformers' `generate` and its continuous
batching, 16 or 4 episodes in a micro-batch, adapters in float32 or bfloat16. The dtype is bfloat16 where the CPU has
AVX512, else float32.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from episodes import (
    ALPHA,
    EPISODES,
    HH,
    NEW,
    RANK,
    RATE,
    TEMPLATE,
    add_arguments,
    measured,
    rate,
    run_align,
    sampling_recipe,
    written_prompts,
)

SAMPLES, KL_COEF = 4, 0.04
SETTINGS = {  # episodes in one of TRL's micro-batches, the dtype of its adapters, and how it samples
    "16 at once": {"rows": 16},
    "4 at once": {"rows": 4},
    "16 at once, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16"},
    "4 at once, bfloat16 adapters": {"rows": 4, "adapters": "bfloat16"},
    "16 at once, continuous batching": {"rows": 16, "continuous": True},
    "16 at once, continuous batching, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16", "continuous": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, SETTINGS)
    parser.add_argument("--dtype", help="default: bfloat16 where the CPU has AVX512, else float32")
    args = parser.parse_args()
    if args.arm:
        spec = json.loads(args.arm)
        result = ARMS[spec["arm"]](spec)
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return
    args.data = args.data or (HH if HH.is_file() else TEMPLATE)
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


def compare(args: argparse.Namespace, work: Path) -> None:
    dtype = args.dtype or native_dtype()
    spec = {"base": args.base, "dtype": dtype, "threads": args.threads, "work": str(work), "samples": SAMPLES}
    print(f"{args.base}, {dtype}, {args.threads} threads, {EPISODES} episodes of up to {NEW} tokens an update")
    if dtype == "float32" and not args.dtype:
        print("this CPU has no AVX512: bfloat16 would be slow on both sides")
    spec["prompts"] = measured(__file__, {**spec, "arm": "prepare", "prepare": str(args.data)})["prompts"]

    def measure(arm: str, updates: int, name: str = "") -> dict:
        result = measured(__file__, {**spec, "arm": arm, "updates": updates, "setting": SETTINGS.get(name)})
        if "error" in result:
            print(f"{arm:5} {name}: {result['error']}", flush=True)
            return {"episodes_per_second": 0.0, "peak_bytes": 0, "response_tokens": 0.0}
        told = f"{result['episodes_per_second']:8.3f} episodes/s {result['response_tokens']:6.1f} tokens each"
        print(f"{arm:5} {name:52} {told} {result['peak_bytes'] / 1e9:6.2f} GB", flush=True)
        return result

    setting = args.setting
    if setting is None:
        print("\nTRL's settings, two updates each, of which the second counts:")
        tried = {name: measure("trl", 2, name)["episodes_per_second"] for name in SETTINGS}
        setting = max(tried, key=tried.get)
    print(f"\nside by side, {args.updates} updates each, TRL with {setting}")
    pairs = [(measure("align", args.updates), measure("trl", args.updates, setting)) for _ in range(args.rounds)]
    if not all(side["episodes_per_second"] for pair in pairs for side in pair):
        sys.exit("a side did not run, so there is nothing to compare")

    def mean(side: int) -> float:
        return round(sum(pair[side]["episodes_per_second"] for pair in pairs) / len(pairs), 4)

    ours, peer = (
        {"episodes_per_second": mean(i), "peak_bytes": max(p[i]["peak_bytes"] for p in pairs)} for i in (0, 1)
    )
    ratios = [round(a["episodes_per_second"] / b["episodes_per_second"], 3) for a, b in pairs]
    line = {
        "benchmark": "vs_trl_grpo", "dtype": dtype, "ratio": round(sum(ratios) / len(ratios), 3), "ratios": ratios,
        "memory_ratio": round(ours["peak_bytes"] / peer["peak_bytes"], 3), "ours": ours,
        "peer": peer | {"setting": setting}, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(f"\n{'':24}{'align':>10}{'TRL':>10}{'ratio':>8}")
    print(f"{'episodes per second':24}{mean(0):>10.3f}{mean(1):>10.3f}{line['ratio']:>8.2f}")
    memory = f"{ours['peak_bytes'] / 1e9:>10.2f}{peer['peak_bytes'] / 1e9:>10.2f}"
    print(f"{'peak memory, GB':24}{memory}{line['memory_ratio']:>8.2f}")
    print(json.dumps(line))


def native_dtype() -> str:
    import torch

    return "bfloat16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "float32"


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
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from align import grpo
    from align.data.formats.prompts import asked, prompts
    from align.data.mixture import prepare
    from align.models.base import base_folder, load_tokenizer
    from align.models.demo import cache_folder
    from align.training.plan import Plan

    torch.set_num_threads(spec["threads"])
    recipe = grpo.Recipe.model_validate(sampling_recipe(spec, "grpo", own(), Path(spec["work"]) / "unused"))
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe.data, tokenizer, prompts(), 0, cache_folder()).train
    plan, rows = Plan(recipe, data), asked(data)
    chosen = [int(i) for step in range(1, spec["updates"] + 1) for i in plan.batch(step)]
    talks = [rows[i].messages for i in chosen]
    ids = tokenizer.apply_chat_template(talks, add_generation_prompt=True, return_dict=False)
    assert ids == [data.tree(i).segments[0].tolist() for i in chosen], "both sides are asked the same"
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    setting, ends, lengths = spec["setting"], list[float](), list[float]()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args, **_options):
            ends.append(time.perf_counter())

        def on_step_end(self, *_args, **_options):
            ends.append(time.perf_counter())

    def reward(completions: Sequence[list[dict]], completion_ids: Sequence[list[int]], **_more: object) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return worth([], [talk[0]["content"] for talk in completions], [])

    options = GRPOConfig(
        output_dir=spec["work"], use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=10**6, disable_tqdm=True, dataloader_pin_memory=False,
        learning_rate=RATE, lr_scheduler_type="constant", max_steps=spec["updates"], shuffle_dataset=False,
        per_device_train_batch_size=setting["rows"], gradient_accumulation_steps=EPISODES // setting["rows"],
        num_generations=SAMPLES, max_completion_length=NEW, beta=KL_COEF,
        use_transformers_continuous_batching=setting.get("continuous", False),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base_folder(recipe.model), dtype=getattr(torch, spec["dtype"]))
    trainer = GRPOTrainer(
        model, reward, options, train_dataset=Dataset.from_dict({"prompt": talks}), processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )  # fmt: skip
    if setting.get("adapters") == "bfloat16":
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    assert len(ends) == spec["updates"] + 1, "an update is a step"
    return {"episodes_per_second": rate(ends, spec["updates"]), "response_tokens": sum(lengths) / len(lengths)}


ARMS = {"prepare": prepare, "align": run_ours, "trl": run_trl}


if __name__ == "__main__":
    main()
