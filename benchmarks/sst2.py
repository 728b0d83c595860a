"""Whether PPO or GRPO learns on real parts: an SST-2 classifier as reward, beginnings of SST-2 sentences as prompts.

    python benchmarks/sst2.py [--stage ppo | grpo] --actor FOLDER [--judge FOLDER] [--seeds 0 1 2]

The reward is the log-odds of `positive` (label 1) that a classifier of align.classify, trained on SST-2 by
recipes/sentiment.yaml, gives to the text of prompt and response together; `--judge` is its `final/`. Prompts are the
first 2 to 8 tokens of sentences, held-out ones from the dev sentences. Prints, for each seed, the held-out reward
before and after, with its 95 % interval over prompts, and the KL to the reference.
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

from align import classify, grpo, ppo
from align.models.base import load_tokenizer
from align.recipe.schema import Model

SHARED = Path(__file__).resolve().parents[2] / "shared"
STAGES = {"ppo": ppo, "grpo": grpo}
SETTINGS = {  # as many episodes a step
    "ppo": {"batch": {"examples": 16}, "own": {"samples": 4}},
    "grpo": {"batch": {"examples": 8}, "own": {"samples": 8, "epochs": 4}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SETTINGS, default="ppo")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "sst2")
    parser.add_argument("--actor", default=str(SHARED / "models" / "stories260k"))
    parser.add_argument("--judge", help="default: trained now")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kl-coef", type=float, default=0.1)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        judge = args.judge or trained_judge(args.data, folder)
        for side in ("train", "dev"):
            write_stems(args, side, folder)
        rows = [run_seed(args, seed, judge, folder) for seed in args.seeds]
    print(f"\n{'seed':6}{'before':>10}{'after':>10}{'95 % interval':>20}{'KL, nats':>10}{'seconds':>10}")
    for row in rows:
        low, high = row["low"], row["high"]
        shown = f"{row['before']:>10.3f}{row['after']:>10.3f}{low:>12.3f} –{high:>7.3f}{row['kl']:>9.2f}"
        print(f"{row['seed']:<6}{shown}{row['seconds']:>10.0f}")
    line = {
        "benchmark": "sst2", "stage": args.stage, "seeds": rows, "actor": Path(args.actor).name,
        "learned": sum(row["low"] > row["before"] and row["kl"] < 10 for row in rows),
        "seconds": round(time.perf_counter() - started), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(line))


def trained_judge(data: Path, folder: Path) -> str:
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "sentiment.yaml"
    changes = [f"run={folder / 'judge'}", f"data.train.0.path={data / 'train.tsv'}", "train.epochs=1"]
    classify.main([str(recipe), *changes, "batch.examples=32"])
    return str(folder / "judge" / "final")


def write_stems(args: argparse.Namespace, side: str, folder: Path) -> None:
    tokenizer = load_tokenizer(Model(base=args.actor))
    lines = (args.data / f"{side}.tsv").read_text(encoding="utf-8").splitlines()
    draw = random.Random(0)
    draw.shuffle(lines)
    stems = {}
    for line in lines:
        ids = tokenizer(line.rsplit("\t", 1)[0], add_special_tokens=False)["input_ids"]
        stem = tokenizer.decode(ids[: draw.randint(2, 8)]).strip()
        if len(ids) > 8 and stem:
            stems[stem] = None
    chosen = list(stems)[: 96 if side == "dev" else 2000]
    text = "".join(json.dumps({"text": stem}) + "\n" for stem in chosen)
    (folder / f"{side}.jsonl").write_text(text, encoding="utf-8")


def run_seed(args: argparse.Namespace, seed: int, judge: str, folder: Path) -> dict:
    run, settings = folder / f"run-{seed}", SETTINGS[args.stage]
    recipe = {
        "stage": args.stage, "run": str(run), "seed": seed, "model": {"base": args.actor},
        "lora": {"r": 8, "alpha": 16},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": {"sources": [{"path": str(folder / "dev.jsonl")}]},
        },
        "batch": settings["batch"],
        "optim": {"learning_rate": args.learning_rate, "warmup": 3, "schedule": "linear"},
        "train": {"steps": args.steps, "eval_every": 8, "save_every": None},
        "log": {"trackers": []},
        args.stage: settings["own"] | {
            "rewards": [{"model": judge, "label": "1", "name": "positive"}],
            "generation": {"max_new": 24}, "kl_coef": args.kl_coef, "eval_samples": 2,
        },
    }  # fmt: skip
    path = folder / f"{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        STAGES[args.stage].main([str(path)])
    held = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in held if record["split"] == "eval"]
    last = held[-1]
    print(f"seed {seed}: " + ", ".join(f"{r['score']:.3f} at KL {r['kl']:.2f}" for r in held), flush=True)
    return {
        "seed": seed, "before": held[0]["score"], "after": last["score"], "low": last["score_low"],
        "high": last["score_high"], "kl": last["kl"], "seconds": time.perf_counter() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()
