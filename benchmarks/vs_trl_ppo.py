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
import json
import subprocess
import sys
import time
from pathlib import Path

from episodes import (
    EPISODES,
    NEW,
    ROOT,
    command,
    common_recipe,
    for_trl,
    lora,
    options,
    run_align,
    trained,
    written_prompts,
)
from sides import HEADER, Sides, arguments, measured, run

TRL = "trl==1.12.0"
EPOCHS, KL_COEF = 4, 0.05
SETTINGS = {  # episodes in one of TRL's micro-batches, and the dtype of its adapters
    "16 at once": {"rows": 16},
    "4 at once": {"rows": 4},
    "16 at once, bfloat16 adapters": {"rows": 16, "adapters": "bfloat16"},
}


def compare(args: argparse.Namespace, work: Path) -> None:
    trl = args.trl or installed()
    spec = {"base": args.base, "dtype": args.dtype, "threads": args.threads, "work": str(work)}
    prepared = measured(__file__, {**spec, "arm": "prepare", "prepare": str(args.data)})
    spec |= {name: prepared[name] for name in ("prompts", "reward")}
    environment = {"PYTHONPATH": str(trl), "TRL_EXPERIMENTAL_SILENCE": "1"}
    setting, (four, one) = Sides(__file__, args, SETTINGS, spec, environment).side_by_side(1, 4, 1)
    print(f"\n{HEADER}\n{four.row('4 prompts x 4 samples')}\n{one.row('16 prompts x 1')}")

    def told(side: int) -> dict:
        return {"episodes_per_second": four.mean(side), "one_sample": one.mean(side), "peak_bytes": four.peak(side)}

    before = {"before": told(2)} if args.before else {}
    line = {
        "benchmark": "vs_trl_ppo", "dtype": args.dtype, "ratio": four.ratio, "ratio_one_sample": one.ratio,
        "ratios": {"4": four.ratios, "1": one.ratios}, "memory_ratio": max(four.memory_ratio, one.memory_ratio),
        "ours": told(0), "peer": told(1) | {"setting": setting}, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(line | before))


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
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from align import ppo
    from align.models.base import base_folder

    given = for_trl(spec, ppo, own(spec))
    tokenizer, lengths = given.tokenizer, list[float]()
    ids = [prompt for prompt in given.ids for _ in range(spec["samples"])]
    # Its padding is told by the token alone, and the end of turn stands inside prompts too.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    folder, dtype = base_folder(given.recipe.model), getattr(torch, spec["dtype"])

    def scorer() -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    value = get_peft_model(scorer(), lora("SEQ_CLS")).base_model.model  # with its LoRA's layers in it
    config = PPOConfig(
        **options(spec), num_ppo_epochs=EPOCHS, num_mini_batches=1, local_rollout_forward_batch_size=EPISODES,
        total_episodes=EPISODES * spec["updates"], response_length=NEW, stop_token="eos", temperature=1.0,
        kl_coef=KL_COEF, num_sample_generations=0,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorer().eval(),
        value_model=value, train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:1]}), peft_config=lora("CAUSAL_LM"),
    )  # fmt: skip

    from trl.experimental.ppo import ppo_trainer

    truncate = ppo_trainer.truncate_response

    def noted(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        cut = truncate(stop, pad, responses)
        lengths.append(float((cut != pad).float().sum(1).mean()))
        return cut

    ppo_trainer.truncate_response = noted
    return {"episodes_per_second": trained(spec, trainer), "response_tokens": sum(lengths) / len(lengths)}


if __name__ == "__main__":
    parser = arguments(__doc__, SETTINGS)
    parser.add_argument("--trl", type=Path, help=f"folder that holds {TRL}; default: installed into the cache")
    run(parser, {"prepare": prepare, "align": run_ours, "trl": run_trl}, compare)
