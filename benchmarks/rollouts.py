"""Whether a run learns the same when a server draws its responses: PPO or GRPO, once by itself and once by the server.

    benchmarks/vllm_cpu.sh                                    # then start the server on the embedded model, as it says
    python benchmarks/rollouts.py --url http://127.0.0.1:8000 [--stage ppo] [--seeds 0 1] [--steps 20] [--no-seed]

SmolLM2-135M learns answers of one sentence (`benchmarks/verifiable.py --task sentence`). Prints the score of held-out
prompts over the run with its 95 % interval for both engines, whether the intervals meet, how far the engines are apart,
and the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import import_module
from pathlib import Path

import yaml
from verifiable import write_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--stage", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--no-seed", action="store_true", help="send none; vLLM's CPU build ends when it gets one")
    args = parser.parse_args()
    engines = {"own": "own", "server": {"url": args.url, "seeds": not args.no_seed}}
    found: dict[str, list[list[dict]]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_prompts("sentence", folder)
        for name, engine in engines.items():
            found[name] = [records(args, seed, engine, folder / f"{name}-{seed}") for seed in args.seeds]
    line = {"benchmark": "rollouts", "stage": args.stage, "steps": args.steps, "date": time.strftime("%Y-%m-%d")}
    print(f"\n{'seed':5}{'step':>5}  {'own engine':24}{'server':24}meet")
    meet = []
    for seed, own, other in zip(args.seeds, *found.values(), strict=True):
        for one, two in zip(*([r for r in side if r["split"] == "eval"] for side in (own, other)), strict=True):
            meet.append(one["score_low"] <= two["score_high"] and two["score_low"] <= one["score_high"])
            print(f"{seed:<5}{one['step']:>5}  {shown(one):24}{shown(two):24}{'yes' if meet[-1] else 'NO'}")
    for name, sides in found.items():
        steps = [r for side in sides for r in side if r["split"] == "train"]
        told = {key: mean(steps, key) for key in ("step_seconds", "sample_seconds", "mismatch_kl", "importance")}
        line[name] = {key: value for key, value in told.items() if value is not None}
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in line[name].items()))
    print(json.dumps(line | {"meet": sum(meet), "of": len(meet)}))


def records(args: argparse.Namespace, seed: int, engine: str | dict, run: Path) -> list[dict]:
    """What a run logged."""
    own = {
        "rewards": [{"function": "align.training.rules:one_sentence"}], "samples": 4, "eval_samples": 4,
        "generation": {"max_new": 40, "engine": engine},
    }  # fmt: skip
    sources = {side: [{"path": str(run.parent / f"{side}.jsonl")}] for side in ("train", "held")}
    recipe = {
        "stage": args.stage, "run": str(run), "seed": seed, "model": {"base": args.base, "dtype": args.dtype},
        "lora": {"r": 16, "alpha": 32}, "data": {"train": sources["train"], "eval": {"sources": sources["held"]}},
        "batch": {"examples": 8}, "optim": {"learning_rate": args.learning_rate, "warmup": 3},
        "train": {"steps": args.steps, "eval_every": max(1, args.steps // 2), "save_every": None},
        "log": {"trackers": []}, args.stage: own,
    }  # fmt: skip
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    import_module(f"align.{args.stage}").main([str(path)])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mean(steps: list[dict], key: str) -> float | None:
    told = [record[key] for record in steps if key in record]
    return sum(told) / len(told) if told else None


def shown(record: dict) -> str:
    return f"{record['score']:.3f} ({record['score_low']:.3f} – {record['score_high']:.3f})"


if __name__ == "__main__":
    main()
