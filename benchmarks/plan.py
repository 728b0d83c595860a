"""The plan's peak beside the measured one: every stage for a few steps of SmolLM2-135M, on this machine.

    python benchmarks/plan.py [--only NAME ...] [--processes 2] [--steps 2] [--folder DIR]

Prints a table, and last one JSON line with its rows; status 1 where a plan is off by more than 12 %. On a CPU the
measured peak is resident memory beyond what there was before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

BOUND = 0.12
WORDS = "the river runs slowly past old houses and a garden where somebody planted beans last spring"
BASE: dict[str, Any] = {
    "seed": 1,
    "model": {"base": "demo/smollm2-135m"},
    "lora": {"r": 16},
    "log": {"trackers": []},
    "optim": {"warmup": 0},
}


def text(words: int, at: int) -> str:
    """So many words, other ones at another place."""
    known = WORDS.split()
    return " ".join(known[(i + at) % len(known)] for i in range(words))


def rows(folder: Path) -> dict[str, Path]:
    """Small files of texts, pairs, verdicts and classes, 64 rows each."""
    made = {
        "text": [{"text": text(120, i)} for i in range(64)],
        "pairs": [{"prompt": text(30, i), "chosen": text(60, i + 1), "rejected": text(60, i + 2)} for i in range(64)],
        "verdicts": [{"prompt": text(30, i), "completion": text(60, i + 3), "label": i % 2 == 0} for i in range(64)],
        "classes": [{"text": text(100, i), "label": "ab"[i % 2]} for i in range(64)],
        "prompts": [{"prompt": text(40, i)} for i in range(64)],
    }
    paths = {}
    for name, lines in made.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def recipes(paths: dict[str, Path], steps: int, reward: Path) -> dict[str, dict[str, Any]]:
    """By name; all short, so that a slow machine goes through them in minutes. `reward`: a reward model's result."""

    def recipe(stage: str, data: str, examples: int, **more: Any) -> dict[str, Any]:
        train = [{"path": str(paths[data])}]
        about = {"stage": stage, "data": {"train": train, "max_length": 512}, "batch": {"examples": examples}}
        return BASE | about | {"train": {"steps": steps, "save_every": None}} | more

    checkpointed = {"model": {"base": "demo/smollm2-135m", "gradient_checkpointing": True}}
    whole = {"lora": None}
    few_bits = {n: {"model": {"base": "demo/smollm2-135m", "quantize": n}} for n in ("4bit", "8bit")}
    rewards = [{"function": "align.training.rules:sentiment", "name": "rule"}]
    drawn = {"samples": 2, "generation": {"max_new": 24}}
    longer = {"samples": 8, "generation": {"max_new": 40}}
    six = {"train": {"steps": 3 * steps, "save_every": None}}  # rows of other lengths, one after another
    ptx = {"sources": [{"path": str(paths["text"])}], "examples": 12, "max_length": 512}
    return {
        "sft": recipe("sft", "text", 4),
        "sft rows": recipe("sft", "text", 8, batch={"examples": 8, "row_tokens": 512}),
        "sft long row": recipe("sft", "text", 24),
        "sft checkpointing": recipe("sft", "text", 8, **checkpointed),
        "sft lora null": recipe("sft", "text", 4, **whole),
        "reward": recipe("reward", "pairs", 3),
        "dpo": recipe("dpo", "pairs", 3),
        "dpo cached": recipe("dpo", "pairs", 3, dpo={"reference": "cached"}),
        "dpo lora null": recipe("dpo", "pairs", 3, **whole),
        "kto": recipe("dpo", "verdicts", 6, dpo={"loss": "kto"}),
        "classify": recipe("classify", "classes", 6),
        "classify last block": recipe("classify", "classes", 6, classify={"train": "last_blocks"}, **whole),
        "ppo": recipe("ppo", "prompts", 4, ppo=drawn | {"rewards": rewards, "epochs": 2}),
        "ppo adapter ptx": recipe("ppo", "prompts", 4, ppo=drawn | {"rewards": [{"adapter": str(reward)}], "ptx": ptx}),
        "grpo": recipe("grpo", "prompts", 4, grpo=drawn | {"rewards": rewards}),
        "ppo longer": recipe("ppo", "prompts", 4, ppo=longer | {"rewards": rewards}, **six),
        "grpo longer": recipe("grpo", "prompts", 4, grpo=longer | {"rewards": rewards}, **six),
        "distill": recipe("distill", "prompts", 4, distill=drawn | {"teacher": {"base": "demo/smollm2-135m"}}),
        "sft 4bit": recipe("sft", "text", 4, **few_bits["4bit"]),
        "sft 8bit": recipe("sft", "text", 4, **few_bits["8bit"]),
        "dpo 4bit": recipe("dpo", "pairs", 3, **few_bits["4bit"]),
        "ppo 8bit": recipe("ppo", "prompts", 4, ppo=drawn | {"rewards": rewards, "epochs": 2}, **few_bits["8bit"]),
    }


def measured(name: str, recipe: dict[str, Any], folder: Path, processes: int, shard: bool) -> dict[str, Any]:
    """Run one recipe; its planned and measured peak."""
    run = folder / name.replace(" ", "-")
    recipe = recipe | {"run": str(run)}
    if shard:
        recipe["train"] = recipe["train"] | {"shard": "layers"}
    path = folder / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", f"align.{recipe['stage']}", str(path)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "-m"]
        command = [sys.executable, *torchrun, *command[2:]]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"run": name, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
    told = json.loads((run / "summary.json").read_text())
    planned, found = told["planned_peak_bytes"], told["measured_peak_bytes"]
    return {"run": name, "planned": planned, "measured": found, "ratio": planned / found}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", action="store_true", help="train.shard: layers")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        made = recipes(rows(folder), asked.steps, folder / "reward" / "final")
        if asked.only and "ppo adapter ptx" in asked.only and "reward" not in asked.only:
            measured("reward", made["reward"], folder, 1, False)
        for name, recipe in made.items():
            if asked.only and name not in asked.only:
                continue
            record = measured(name, recipe, folder, asked.processes, asked.shard)
            found.append(record)
            if "failed" in record:
                print(f"{name:22} failed: {record['failed']}", flush=True)
            else:
                planned, peak = record["planned"] / 1e9, record["measured"] / 1e9
                print(
                    f"{name:22} planned {planned:6.2f} GB  measured {peak:6.2f} GB  {record['ratio']:5.2f}", flush=True
                )
    print(json.dumps({"processes": asked.processes, "shard": asked.shard, "runs": found}))
    if any("failed" in record or abs(record["ratio"] - 1) > BOUND for record in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
