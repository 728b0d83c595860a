"""How well a reward model ranks held-out pairs: SST-2 sentences (positive over negative), or HH harmless rows.

    python benchmarks/reward_accuracy.py sst2 [--data FOLDER] [--pairs 1600]
    python benchmarks/reward_accuracy.py hh [--data FOLDER]

Trains `align.reward` on SmolLM2-135M and prints the accuracy on pairs that it has not seen, with its 95 % interval, and
the time. SST-2 is made into pairs in a seeded order: each positive sentence with a negative one, dev against dev.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import yaml

from align.reward import main as reward

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PROMPT = "Write a sentence about a film."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sst2", "hh"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--pairs", type=int, default=1600, help="training pairs of sst2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        data = sst2(args, folder) if args.task == "sst2" else hh(args)
        recipe = {
            "stage": "reward", "run": str(folder / "run"), "seed": args.seed, "model": {"base": args.base},
            "lora": {"r": 8, "alpha": 16}, "data": data, "batch": {"examples": 16},
            "optim": {"learning_rate": 2e-4, "warmup": 0.05}, "train": {"epochs": 1, "eval_every": 25},
            "log": {"trackers": []},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        started = time.perf_counter()
        reward([str(folder / "recipe.yaml")])
        seconds = time.perf_counter() - started
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["split"] == "eval"][-1]
    line = {name: round(last[name], 4) for name in ("accuracy", "accuracy_low", "accuracy_high", "loss")}
    print(f"\n{'task':8}{'accuracy':>10}{'95 % interval':>20}{'seconds':>10}")
    low, high = line["accuracy_low"], line["accuracy_high"]
    print(f"{args.task:8}{line['accuracy']:>10.4f}{low:>12.4f} –{high:>7.4f}{seconds:>9.0f}")
    print(json.dumps({"benchmark": f"reward_accuracy {args.task}", **line, "seconds": round(seconds), "seed": args.seed,
                      "date": time.strftime("%Y-%m-%d")}))  # fmt: skip


def sst2(args: argparse.Namespace, folder: Path) -> dict:
    source = args.data or SHARED / "sst2"
    for side, most in (("train", args.pairs), ("dev", None)):
        lines = (source / f"{side}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.rsplit("\t", 1) for line in lines]
        draw = random.Random(args.seed)
        positive, negative = ([text for text, label in rows if label == wanted] for wanted in "10")
        draw.shuffle(positive)
        draw.shuffle(negative)
        pairs = list(zip(positive, negative, strict=False))[:most]
        with (folder / f"{side}.jsonl").open("w", encoding="utf-8") as file:
            for chosen, rejected in pairs:
                file.write(json.dumps({"prompt": PROMPT, "chosen": chosen, "rejected": rejected}) + "\n")
    return {
        "train": [{"path": str(folder / "train.jsonl")}],
        "eval": {"sources": [{"path": str(folder / "dev.jsonl")}], "overlap": "keep"},  # one prompt for all
        "max_length": 256,
        "invalid": "drop",
    }


def hh(args: argparse.Namespace) -> dict:
    source = args.data or SHARED / "hh_harmless" / "rows_0_1499.jsonl"
    return {
        "train": [{"path": str(source)}], "eval": {"fraction": 0.25}, "max_length": 512, "overlong": "drop",
        "invalid": "drop",
    }  # fmt: skip


if __name__ == "__main__":
    main()
