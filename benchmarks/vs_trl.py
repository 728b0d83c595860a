"""Our SFT beside TRL's SFTTrainer: one run, same rows, LoRA, dtype, threads and examples a step.

    python benchmarks/vs_trl.py sft [--data FILE] [--threads 2] [--steps 4]

Each side runs in processes of its own, in turn. TRL gets the very tokens and labels that `align.sft` makes of the
rows, and the fastest of its own settings (tried first): padded micro-batches, padding-free, packing, autocast,
bfloat16 adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, MAX_LENGTH, RANK, ALPHA, SEED = 16, 512, 8, 16, 0
REAL_ROWS = ROOT.parent / "shared" / "data" / "llamafactory" / "alpaca_en_demo.json"

# per_device_train_batch_size, and what else differs
TRL_SETTINGS = {
    "padded, 1 row": {"rows": 1},
    "padded, 1 row, bfloat16 adapters": {"rows": 1, "adapters": "bfloat16"},
    "padded, 1 row, autocast": {"rows": 1, "bf16": True},
    "padded, 4 rows": {"rows": 4},
    "padding-free, 4 rows": {"rows": 4, "padding_free": True},
    "packed to 512": {"rows": 1, "pack": 512},
    "packed to 1024": {"rows": 1, "pack": 1024},
    "packed to 1024, bfloat16 adapters": {"rows": 1, "pack": 1024, "adapters": "bfloat16"},
    "packed to 2048": {"rows": 1, "pack": 2048},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sft"])
    parser.add_argument("--data", type=Path, default=REAL_ROWS if REAL_ROWS.is_file() else None)
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turn")
    parser.add_argument("--setting", choices=TRL_SETTINGS, help="use this of TRL's settings instead of trying all")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data = args.data or ROOT / "data_templates" / "alpaca.json"
    if args.arm:
        run_arm(json.loads(args.arm))
        return
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


def compare(args: argparse.Namespace, work: Path) -> None:
    common = {
        "data": str(args.data), "base": args.base, "dtype": args.dtype, "threads": args.threads, "work": str(work),
    }  # fmt: skip

    def measure(arm: str, steps: int, setting: str = "") -> dict:
        result = measured({**common, "arm": arm, "steps": steps, "setting": setting}, args.threads)
        note = f"{result['tokens_per_second']:8.1f} tokens/s {result['peak_bytes'] / 1e9:6.2f} GB"
        print(f"{arm:5} {setting:36} {note}" if "error" not in result else f"{arm} {setting}: {result['error']}")
        sys.stdout.flush()
        return result

    print(f"rows of {args.data.name}, {args.base}, {args.dtype}, {args.threads} threads, {EXAMPLES} examples a step")
    setting = args.setting
    if setting is None:
        print("\nTRL's settings, two steps each:")
        tried = {name: measure("trl", 2, name)["tokens_per_second"] for name in TRL_SETTINGS}
        setting = max(tried, key=tried.get)
    print(f"\nside by side, {args.steps} steps each, TRL with: {setting}")
    pairs = [(measure("align", args.steps), measure("trl", args.steps, setting)) for _ in range(args.rounds)]
    ours, peer = ([pair[side] for pair in pairs] for side in (0, 1))
    speed, memory = "tokens_per_second", "peak_bytes"
    ratios = [a[speed] / b[speed] for a, b in pairs]
    line = {
        "benchmark": "vs_trl sft",
        "ratio": round(sum(ratios) / len(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "memory_ratio": round(max(r[memory] for r in ours) / max(r[memory] for r in peer), 3),
        "ours": {speed: round(mean(ours, speed), 1), memory: max(r[memory] for r in ours)},
        "peer": {speed: round(mean(peer, speed), 1), memory: max(r[memory] for r in peer), "setting": setting},
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"\n{'':8}{'useful tokens/s':>18}{'peak memory':>14}")
    for name, results in (("align", ours), ("TRL", peer)):
        print(f"{name:8}{mean(results, speed):>18.1f}{max(r[memory] for r in results) / 1e9:>11.2f} GB")
    print(f"{'ratio':8}{line['ratio']:>18.2f}{line['memory_ratio']:>14.2f}")
    print(json.dumps(line))


def mean(results: list[dict], key: str) -> float:
    return sum(r[key] for r in results) / len(results)


def measured(spec: dict, threads: int) -> dict:
    """Run one arm in its own process; its last line is its result."""
    command = [sys.executable, __file__, "sft", "--arm", json.dumps(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"tokens_per_second": 0.0, "peak_bytes": 0, "error": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_arm(spec: dict) -> None:
    import resource

    result = run_align(spec) if spec["arm"] == "align" else run_trl(spec)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


def recipe_of(spec: dict, run: Path) -> dict:
    return {
        "stage": "sft", "run": str(run), "seed": SEED,
        "model": {"base": spec["base"], "dtype": spec["dtype"]},
        "lora": {"r": RANK, "alpha": ALPHA},
        "data": {
            "train": [{"path": spec["data"]}], "max_length": MAX_LENGTH, "overlong": "truncate", "invalid": "drop",
        },
        "batch": {"examples": EXAMPLES},
        "train": {"steps": spec["steps"]},
        "log": {"trackers": []},
    }  # fmt: skip


def run_align(spec: dict) -> dict:
    import contextlib
    import io

    import yaml

    from align.sft import main as sft

    run = Path(tempfile.mkdtemp(dir=spec["work"]))
    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(recipe_of(spec, run)))
    with contextlib.redirect_stdout(io.StringIO()):
        sft([str(recipe)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if line["split"] == "train" and line["step"] > 1]
    tokens, seconds = (sum(line[key] for line in counted) for key in ("tokens", "step_seconds"))
    return {"tokens_per_second": tokens / seconds, "losses": [line["loss"] for line in lines]}


def run_trl(spec: dict) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from align.data.mixture import prepare
    from align.data.render import conversations
    from align.models.base import base_folder, load_tokenizer
    from align.models.demo import cache_folder
    from align.sft import Recipe
    from align.training.plan import Plan

    torch.set_num_threads(spec["threads"])
    recipe = Recipe.model_validate(recipe_of(spec, Path(spec["work"]) / "unused"))
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe.data, tokenizer, conversations("assistant"), SEED, cache_folder()).train
    plan = Plan(recipe, data)
    rows = []
    for step in range(1, plan.steps + 1):
        for i in plan.batch(step):
            (tokens,), (trained,), _ = data.tree(int(i))
            rows.append({"input_ids": tokens.tolist(), "completion_mask": trained.astype(int).tolist()})

    setting = TRL_SETTINGS[spec["setting"]]
    options: dict = {"per_device_train_batch_size": setting["rows"]}
    options["gradient_accumulation_steps"] = EXAMPLES // setting["rows"]
    if "pack" in setting:
        # As many tokens a step as the examples have on average: packs replace examples.
        packs = sum(len(row["input_ids"]) for row in rows) / setting["pack"] / plan.steps
        options |= {"packing": True, "max_length": setting["pack"], "gradient_accumulation_steps": max(1, round(packs))}
    elif setting.get("padding_free"):
        options |= {"padding_free": True, "max_length": None}
    else:
        options |= {"max_length": MAX_LENGTH}
    arguments = SFTConfig(
        output_dir=spec["work"],
        use_cpu=True,
        bf16=setting.get("bf16", False),
        gradient_checkpointing=False,
        completion_only_loss=True,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=2e-4,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    micro_batches, ends = [], []  # real tokens of each micro-batch, as it was collated; the end of each step

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_options):
            ends.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(base_folder(recipe.model), dtype=getattr(torch, spec["dtype"]))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    if setting.get("adapters") == "bfloat16":
        model, lora = get_peft_model(model, lora, autocast_adapter_dtype=False), None
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counting(features):
        # Lengths of the rows, whatever padding the collator adds. It runs ahead of the steps.
        micro_batches.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    counted = sum(micro_batches[options["gradient_accumulation_steps"] :])  # all but the first step's
    return {"tokens_per_second": counted / (ends[-1] - ends[0])}


if __name__ == "__main__":
    main()
