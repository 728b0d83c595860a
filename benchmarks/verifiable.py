"""Whether GRPO teaches the embedded model a task whose answers can be checked, on prompts that it has not seen.

    python benchmarks/verifiable.py [--task sentence | sums] [--seeds 0 1 2] [--steps 20]

`sentence` gives beginnings of sentences and rewards those that come to an end within 7 tokens; `sums` asks for
one-digit sums in words and rewards the right number. A fifth of the prompts is held out. Prints, for each seed, the
share of responses to held-out prompts that are right before and after, with its 95 % interval over prompts, the KL to
the reference, and the time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from pathlib import Path

import yaml

from align import grpo

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BEGUN = [
    "Everybody in our street likes {} because",
    "The first thing that I remember about {} is",
    "When I think of {}, I",
    "My sister wrote about {} and",
]
THINGS = [
    "bread",
    "rain",
    "a bicycle",
    "chess",
    "the moon",
    "a library",
    "jazz",
    "tea",
    "snow",
    "a bridge",
    "honey",
    "a mirror",
    "the sea",
    "soap",
    "a kite",
    "glass",
    "a garden",
    "salt",
    "a clock",
    "wool",
    "a candle",
    "maps",
    "a train",
    "cheese",
    "a forest",
]
RULES = {"sums": "exact_answer", "sentence": "one_sentence"}
GENERATION = {"sums": {"max_new": 12}, "sentence": {"max_new": 7, "stop": [".", "!", "?"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=RULES, default="sentence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--kl-coef", type=float, default=0.01)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_prompts(args.task, folder)
        rows = [run_seed(args, seed, folder) for seed in args.seeds]
    print(f"\n{'seed':6}{'before':>10}{'after':>10}{'95 % interval':>20}{'KL, nats':>10}{'seconds':>10}")
    for row in rows:
        shown = f"{row['before']:>10.1%}{row['after']:>10.1%}{row['low']:>12.1%} –{row['high']:>7.1%}{row['kl']:>9.2f}"
        print(f"{row['seed']:<6}{shown}{row['seconds']:>10.0f}")
    learned = sum(row["before"] < 0.3 and row["after"] > 0.8 and row["seconds"] < 1200 for row in rows)
    line = {"benchmark": "verifiable", "task": args.task, "seeds": rows, "learned": learned}
    print(json.dumps(line | {"date": time.strftime("%Y-%m-%d")}))


def write_prompts(task: str, folder: Path) -> None:
    """A fifth of all there are into `held.jsonl`, the others into `train.jsonl`."""
    if task == "sums":
        rows = [
            {"prompt": f"What is {a} plus {b}? Answer with a number.", "answer": str(i + j)}
            for i, a in enumerate(NUMBERS)
            for j, b in enumerate(NUMBERS)
        ]
    else:
        rows = [{"text": begun.format(thing)} for begun in BEGUN for thing in THINGS]
    random.Random(0).shuffle(rows)
    held = len(rows) // 5
    for name, part in (("held", rows[:held]), ("train", rows[held:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def run_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict:
    run = folder / f"run-{seed}"
    recipe = {
        "stage": "grpo", "run": str(run), "seed": seed, "model": {"base": "demo/smollm2-135m"},
        "lora": {"r": 16, "alpha": 32},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": {"sources": [{"path": str(folder / "held.jsonl")}]},
        },
        "batch": {"examples": 8},
        "optim": {"learning_rate": args.learning_rate, "warmup": 3, "schedule": "linear"},
        "train": {"steps": args.steps, "eval_every": 10, "save_every": None},
        "log": {"trackers": []},
        "grpo": {
            "rewards": [{"function": f"align.training.rules:{RULES[args.task]}", "name": "right"}],
            "samples": 8, "generation": GENERATION[args.task], "kl_coef": args.kl_coef, "eval_samples": 4,
        },
    }  # fmt: skip
    path = folder / f"{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        grpo.main([str(path)])
    held = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in held if record["split"] == "eval"]
    first, last = held[0], held[-1]
    print(f"seed {seed}: " + ", ".join(f"{r['score']:.1%} at KL {r['kl']:.2f}" for r in held), flush=True)
    return {
        "seed": seed, "before": first["score"], "after": last["score"], "low": last["score_low"],
        "high": last["score_high"], "kl": last["kl"], "seconds": time.perf_counter() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()
