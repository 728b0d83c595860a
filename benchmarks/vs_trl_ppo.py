"""align.ppo beside TRL 1.12.0, the last with PPO: one run, same prompts, LoRA, dtype, threads and epochs.

    python benchmarks/vs_trl_ppo.py [--data FILE] [--threads 2] [--updates 3]

An update is 16 episodes, 4 epochs in one minibatch, 48 new tokens at most, on prompts of 16 to 192 tokens: 4 prompts
with 4 samples (TRL is given each prompt four times), and 16 prompts with one. Each side runs in processes of its own,
in turn, TRL with the fastest of its settings, which are tried first. Its value and reward models are SmolLM2 with a
head each, as it needs them; value and policy train LoRAs. TRL is installed into a folder of its own, without
dependencies.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from episodes import (
    ALPHA,
    EPISODES,
    HH,
    NEW,
    RANK,
    RATE,
    ROOT,
    TEMPLATE,
    add_arguments,
    command,
    common_recipe,
    measured,
    rate,
    run_align,
    sampling_recipe,
    written_prompts,
)

TRL = "trl==1.12.0"
EPOCHS, KL_COEF = 4, 0.05
SETTINGS = {  # episodes in one of TRL's micro-batches, and the dtype of its adapters
    "16 at once": {"rows": 16},
    "4 at once": {"rows": 4},
    "16 at once, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, SETTINGS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trl", type=Path, help=f"folder that holds {TRL}; default: installed into the cache")
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
    trl = args.trl or installed()
    common = {"base": args.base, "dtype": args.dtype, "threads": args.threads, "work": str(work), "trl": str(trl)}
    print(f"{args.base}, {args.dtype}, {args.threads} threads, {EPISODES} episodes of up to {NEW} tokens an update")
    prepared = measured(__file__, {**common, "arm": "prepare", "prepare": str(args.data)})
    common |= {name: prepared[name] for name in ("prompts", "reward")}

    def measure(arm: str, samples: int, updates: int, name: str = "") -> dict:
        spec = {**common, "arm": arm, "samples": samples, "updates": updates, "setting": SETTINGS.get(name)}
        result = measured(
            __file__, spec, {"PYTHONPATH": str(trl), "TRL_EXPERIMENTAL_SILENCE": "1"} if arm == "trl" else {}
        )
        if "error" in result:
            print(f"{arm:5} x{samples} {name}: {result['error']}", flush=True)
            return {"episodes_per_second": 0.0, "peak_bytes": 0, "response_tokens": 0.0}
        told = f"{result['episodes_per_second']:8.3f} episodes/s {result['response_tokens']:6.1f} tokens each"
        print(f"{arm:5} x{samples} {name:32} {told} {result['peak_bytes'] / 1e9:6.2f} GB", flush=True)
        return result

    setting = args.setting
    if setting is None:
        print("\nTRL's settings, one update each:")
        tried = {name: measure("trl", 4, 1, name)["episodes_per_second"] for name in SETTINGS}
        setting = max(tried, key=tried.get)
    print(f"\nside by side, {args.updates} updates each, TRL with {setting}")
    found = {samples: [] for samples in (4, 1)}
    for _ in range(args.rounds):
        for samples, pairs in found.items():
            pairs.append((measure("align", samples, args.updates), measure("trl", samples, args.updates, setting)))
    if not all(side["episodes_per_second"] for pairs in found.values() for pair in pairs for side in pair):
        sys.exit("a side did not run, so there is nothing to compare")

    def ratios(samples: int) -> list[float]:
        return [round(a["episodes_per_second"] / b["episodes_per_second"], 3) for a, b in found[samples]]

    def mean(samples: int, side: int) -> float:
        return round(sum(pair[side]["episodes_per_second"] for pair in found[samples]) / args.rounds, 4)

    def peak(samples: int, side: int) -> int:
        return max(pair[side]["peak_bytes"] for pair in found[samples])

    print(f"\n{'':24}{'align':>10}{'TRL':>10}{'ratio':>8}{'memory':>18}{'ratio':>8}")
    for samples, name in ((4, "4 prompts x 4 samples"), (1, "16 prompts x 1")):
        ratio, memory = sum(ratios(samples)) / args.rounds, (peak(samples, 0) / 1e9, peak(samples, 1) / 1e9)
        print(
            f"{name:24}{mean(samples, 0):>10.3f}{mean(samples, 1):>10.3f}{ratio:>8.2f}"
            f"{memory[0]:>8.2f} /{memory[1]:>5.2f} GB{memory[0] / memory[1]:>8.2f}"
        )
    line = {
        "benchmark": "vs_trl_ppo",
        "ratio": round(sum(ratios(4)) / args.rounds, 3),
        "ratio_one_sample": round(sum(ratios(1)) / args.rounds, 3),
        "ratios": {str(samples): ratios(samples) for samples in found},
        "memory_ratio": round(max(peak(samples, 0) / peak(samples, 1) for samples in found), 3),
        "ours": {"episodes_per_second": mean(4, 0), "one_sample": mean(1, 0), "peak_bytes": peak(4, 0)},
        "peer": {
            "episodes_per_second": mean(4, 1), "one_sample": mean(1, 1), "peak_bytes": peak(4, 1), "setting": setting,
        },
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(line))


def installed() -> Path:
    """The folder with TRL's last version that has PPO."""
    from align.models.demo import cache_folder

    folder = cache_folder() / "peers" / TRL
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(command, check=True)
    return folder


def prepare(spec: dict) -> dict:
    """The prompts as a file, and a reward model on the trunk, of one step."""
    from align import reward

    work = Path(spec["work"])
    recipe = common_recipe(spec) | {
        "stage": "reward", "run": str(work / "reward"), "batch": {"examples": 4},
        "data": {"train": [{"path": str(ROOT / "data_templates" / "pairs.jsonl")}], "max_length": 512},
        "reward": {"demonstration_rows": 8}, "train": {"steps": 1},
    }  # fmt: skip
    command(reward, recipe, work)
    return {"prompts": str(written_prompts(spec)), "reward": str(work / "reward" / "final")}


def own(spec: dict) -> dict:
    return {"rewards": [{"adapter": spec["reward"]}], "epochs": EPOCHS, "kl_coef": KL_COEF}


def run_ours(spec: dict) -> dict:
    from align import ppo

    return run_align(spec, ppo, own(spec))


def run_trl(spec: dict) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from align import ppo
    from align.data.formats.prompts import prompts
    from align.data.mixture import prepare
    from align.models.base import base_folder, load_tokenizer
    from align.models.demo import cache_folder
    from align.training.plan import Plan

    torch.set_num_threads(spec["threads"])
    recipe = ppo.Recipe.model_validate(sampling_recipe(spec, "ppo", own(spec), Path(spec["work"]) / "unused"))
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe.data, tokenizer, prompts(), 0, cache_folder()).train
    plan = Plan(recipe, data)
    chosen = [int(i) for step in range(1, spec["updates"] + 1) for i in plan.batch(step)]
    ids = [data.tree(i).segments[0].tolist() for i in chosen for _ in range(spec["samples"])]
    # Its padding is told by the token alone, and the end of turn stands inside prompts too.
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(0), "left"
    folder, dtype, setting = base_folder(recipe.model), getattr(torch, spec["dtype"]), spec["setting"]

    def lora(task: str) -> LoraConfig:
        return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type=task)

    def scorer() -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    value = get_peft_model(scorer(), lora("SEQ_CLS")).base_model.model  # with its LoRA's layers in it
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args, **_options):
            ends.append(time.perf_counter())

        def on_step_end(self, *_args, **_options):
            ends.append(time.perf_counter())

    lengths: list[float] = []
    options = PPOConfig(
        output_dir=spec["work"], use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", learning_rate=RATE, lr_scheduler_type="constant", num_ppo_epochs=EPOCHS,
        num_mini_batches=1, per_device_train_batch_size=setting["rows"],
        gradient_accumulation_steps=EPISODES // setting["rows"], local_rollout_forward_batch_size=EPISODES,
        total_episodes=EPISODES * spec["updates"], response_length=NEW, stop_token="eos", temperature=1.0,
        kl_coef=KL_COEF, num_sample_generations=0, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=options, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorer().eval(),
        value_model=value, train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:1]}), peft_config=lora("CAUSAL_LM"), callbacks=[Clock()],
    )  # fmt: skip
    if setting.get("adapters") == "bfloat16":
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)

    from trl.experimental.ppo import ppo_trainer

    truncate = ppo_trainer.truncate_response

    def noted(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        cut = truncate(stop, pad, responses)
        lengths.append(float((cut != pad).float().sum(1).mean()))
        return cut

    ppo_trainer.truncate_response = noted
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return {"episodes_per_second": rate(ends, spec["updates"]), "response_tokens": sum(lengths) / len(lengths)}


ARMS = {"prepare": prepare, "align": run_ours, "trl": run_trl}


if __name__ == "__main__":
    main()
