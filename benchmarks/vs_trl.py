"""Our training beside TRL's trainers: one run, same rows, LoRA, dtype, threads and examples a step.

    python benchmarks/vs_trl.py sft|dpo|reward [--data FILE] [--threads 2] [--steps 4] [--before FOLDER]

Each side runs in processes of its own, in turn. TRL gets the very tokens that align makes of the rows, in the same
order, and the fastest of its own settings (tried first): padded micro-batches, padding-free, packing, autocast,
bfloat16 adapters, reference log-probabilities ahead of time. With --before our side of another checkout runs in turn
with both, by its own copy of this script.
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
SHARED = ROOT.parent / "shared" / "data"
ROWS = {
    "sft": [SHARED / "llamafactory" / "alpaca_en_demo.json", ROOT / "data_templates" / "alpaca.json"],
    "dpo": [SHARED / "hh_harmless" / "rows_0_1499.jsonl", ROOT / "data_templates" / "transcripts.jsonl"],
    "reward": [SHARED / "hh_harmless" / "rows_0_1499.jsonl", ROOT / "data_templates" / "transcripts.jsonl"],
}
EXAMPLES = {"sft": 16, "dpo": 4, "reward": 4}  # a step
UNIT = {"sft": "tokens_per_second", "dpo": "pairs_per_second", "reward": "pairs_per_second"}

# per_device_train_batch_size, and what else differs
PADDED = {
    "padded, 1 row": {"rows": 1},
    "padded, 1 row, bfloat16 adapters": {"rows": 1, "adapters": "bfloat16"},
    "padded, 1 row, autocast": {"rows": 1, "bf16": True},
}
PADDED_PAIRS = {
    "padded, 1 pair": {"rows": 1},
    "padded, 2 pairs": {"rows": 2},
    "padded, 4 pairs": {"rows": 4},
    "padded, 1 pair, bfloat16 adapters": {"rows": 1, "adapters": "bfloat16"},
    "padded, 4 pairs, bfloat16 adapters": {"rows": 4, "adapters": "bfloat16"},
    "padded, 1 pair, autocast": {"rows": 1, "bf16": True},
}
TRL_SETTINGS = {
    "sft": PADDED
    | {
        "padded, 4 rows": {"rows": 4},
        "padding-free, 4 rows": {"rows": 4, "padding_free": True},
        "packed to 512": {"rows": 1, "pack": 512},
        "packed to 1024": {"rows": 1, "pack": 1024},
        "packed to 1024, bfloat16 adapters": {"rows": 1, "pack": 1024, "adapters": "bfloat16"},
        "packed to 2048": {"rows": 1, "pack": 2048},
    },
    # TRL 1.16 has switched padding-free DPO off, and has none for reward models.
    "dpo": PADDED_PAIRS
    | {
        "padded, 1 pair, reference ahead": {"rows": 1, "ahead": True},
        "padded, 1 pair, bfloat16 adapters, reference ahead": {"rows": 1, "adapters": "bfloat16", "ahead": True},
        "padded, 4 pairs, reference ahead": {"rows": 4, "ahead": True},
    },
    "reward": PADDED_PAIRS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=TRL_SETTINGS)
    parser.add_argument("--data", type=Path, help="default: published rows if they are there, else a template's")
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turn")
    parser.add_argument("--setting", help="use this of TRL's settings instead of trying all")
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        from vs_trl_arms import run_arm

        run_arm(json.loads(args.arm))
        return
    if args.setting not in (None, *TRL_SETTINGS[args.stage]):
        parser.error("--setting: choose from " + "; ".join(TRL_SETTINGS[args.stage]))
    args.data = args.data or next(path for path in ROWS[args.stage] if path.is_file())
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


def compare(args: argparse.Namespace, work: Path) -> None:
    examples, speed, memory = EXAMPLES[args.stage], UNIT[args.stage], "peak_bytes"
    unit = speed.replace("_per_second", "/s")
    common = {
        "stage": args.stage, "data": str(args.data), "base": args.base, "dtype": args.dtype, "threads": args.threads,
        "examples": examples, "work": str(work),
    }  # fmt: skip

    def measure(side: str, steps: int, name: str = "") -> dict:
        setting, checkout = TRL_SETTINGS[args.stage].get(name, {}), args.before if side == "before" else ROOT
        spec = {**common, "arm": "trl" if side == "trl" else "align", "steps": steps, "setting": setting}
        result = measured(spec, args.threads, checkout)
        if "error" in result:
            print(f"{side:6} {name}: {result['error']}", flush=True)
            return {speed: 0.0, memory: 0}
        print(f"{side:6} {name:50} {result[speed]:9.3f} {unit} {result[memory] / 1e9:6.2f} GB", flush=True)
        return result

    print(f"rows of {args.data.name}, {args.base}, {args.dtype}, {args.threads} threads, {examples} examples a step")
    setting = args.setting
    if setting is None:
        print("\nTRL's settings, two steps each:")
        tried = {name: measure("trl", 2, name)[speed] for name in TRL_SETTINGS[args.stage]}
        setting = max(tried, key=tried.get)
    print(f"\nside by side, {args.steps} steps each, TRL with: {setting}")
    sides = ("align", "trl", "before") if args.before else ("align", "trl")
    rounds = [{side: measure(side, args.steps, setting) for side in sides} for _ in range(args.rounds)]
    if not all(found[speed] for sides in rounds for found in sides.values()):
        sys.exit("a side did not run, so there is nothing to compare")
    ours, peer = ([found[side] for found in rounds] for side in ("align", "trl"))
    ratios = [a[speed] / b[speed] for a, b in zip(ours, peer, strict=True)]
    line = {
        "benchmark": f"vs_trl {args.stage}",
        "ratio": round(sum(ratios) / len(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "memory_ratio": round(max(r[memory] for r in ours) / max(r[memory] for r in peer), 3),
        "ours": {speed: round(mean(ours, speed), 3), memory: max(r[memory] for r in ours)},
        "peer": {speed: round(mean(peer, speed), 3), memory: max(r[memory] for r in peer), "setting": setting},
        "date": time.strftime("%Y-%m-%d"),
    }
    shown = [("align", ours), ("TRL", peer)]
    if args.before:
        before = [found["before"] for found in rounds]
        shown.append(("before", before))
        line["before"] = {speed: round(mean(before, speed), 3), memory: max(r[memory] for r in before)}
    print(f"\n{'':8}{unit:>18}{'peak memory':>14}")
    for name, results in shown:
        print(f"{name:8}{mean(results, speed):>18.3f}{max(r[memory] for r in results) / 1e9:>11.2f} GB")
    print(f"{'ratio':8}{line['ratio']:>18.2f}{line['memory_ratio']:>14.2f}")
    print(json.dumps(line))


def mean(results: list[dict], key: str) -> float:
    return sum(r[key] for r in results) / len(results)


def measured(spec: dict, threads: int, checkout: Path) -> dict:
    """Run one arm of a checkout in its own process; its last line is its result."""
    script = checkout.resolve() / "benchmarks" / "vs_trl.py"
    command = [sys.executable, str(script), spec["stage"], "--arm", json.dumps(spec)]
    given = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout.resolve())}
    environment = {**os.environ, **given}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
