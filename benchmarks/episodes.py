"""What the comparisons of PPO and GRPO with TRL share: the prompts, our recipe, and arms in processes of their own."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
HH = ROOT.parent / "shared" / "data" / "hh_harmless" / "rows_0_1499.jsonl"
TEMPLATE = ROOT / "data_templates" / "prompts.jsonl"
EPISODES, NEW, SHORTEST, LONGEST = 16, 48, 16, 192  # of an update; tokens of responses and prompts
RANK, ALPHA, RATE = 8, 16, 1e-5


def add_arguments(parser: argparse.ArgumentParser, settings: dict[str, dict]) -> None:
    """What both are told; `settings`: TRL's, by name."""
    parser.add_argument("--data", type=Path, help="default: published rows if they are there, else a template's")
    parser.add_argument("--base", default="demo/smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3, help="the first of them is not counted")
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs, in turn")
    parser.add_argument("--setting", choices=settings, help="use this of TRL's settings instead of trying all")
    parser.add_argument("--arm", help=argparse.SUPPRESS)


def measured(script: str, spec: dict, environment: dict[str, str] | None = None) -> dict:
    """Run one arm of a script in its own process; its last line is its result."""
    given = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", **(environment or {})}
    command = [sys.executable, script, "--arm", json.dumps(spec)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def written_prompts(spec: dict) -> Path:
    """The prompts of the right length, as a file."""
    from align.data.formats.prompts import asked, prompts
    from align.data.mixture import prepare
    from align.models.base import load_tokenizer
    from align.models.demo import cache_folder
    from align.recipe.schema import Data, Model

    section = Data.model_validate(
        {"train": [{"path": spec["prepare"]}], "max_length": LONGEST, "overlong": "drop", "invalid": "drop"}
    )
    data = prepare(section, load_tokenizer(Model(base=spec["base"])), prompts(), 0, cache_folder()).train
    rows = [row for row, length in zip(asked(data), data.lengths, strict=True) if length >= SHORTEST]
    file = Path(spec["work"]) / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row.messages}) + "\n" for row in rows))
    return file


def common_recipe(spec: dict) -> dict:
    """Of every stage."""
    return {
        "seed": 0, "model": {"base": spec["base"], "dtype": spec["dtype"]}, "lora": {"r": RANK, "alpha": ALPHA},
        "log": {"trackers": []},
    }  # fmt: skip


def sampling_recipe(spec: dict, stage: str, own: dict, run: Path) -> dict:
    """Of PPO or GRPO: an update's responses in one row; `own`: of the stage's section."""
    return common_recipe(spec) | {
        "stage": stage, "run": str(run),
        "data": {"train": [{"path": spec["prompts"]}], "max_length": LONGEST},
        "batch": {"examples": EPISODES // spec["samples"], "row_tokens": 4096},
        "optim": {"learning_rate": RATE, "schedule": "constant", "warmup": 0},
        "train": {"steps": spec["updates"], "save_every": None},
        stage: {"samples": spec["samples"], "generation": {"max_new": NEW}} | own,
    }  # fmt: skip


def command(stage: ModuleType, recipe: dict, work: Path) -> None:
    """Run one of our stages, in silence."""
    import yaml

    file = work / f"{Path(recipe['run']).name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with contextlib.redirect_stdout(io.StringIO()):
        stage.main([str(file)])


def run_align(spec: dict, stage: ModuleType, own: dict) -> dict:
    """Our side: episodes per second of all updates but the first."""
    run, name = Path(tempfile.mkdtemp(dir=spec["work"])), stage.__name__.removeprefix("align.")
    command(stage, sampling_recipe(spec, name, own, run), Path(spec["work"]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if line["split"] == "train" and line["step"] > 1]
    return {
        "episodes_per_second": len(counted) * EPISODES / sum(line["step_seconds"] for line in counted),
        "response_tokens": sum(line["response_tokens"] for line in counted) / len(counted),
    }


def rate(ends: list[float], updates: int) -> float:
    """Episodes per second between the ends of updates, the first of which is when training began. A trial's only update
    counts whole, else the first does not."""
    counted = ends if updates == 1 else ends[1:]
    return (len(counted) - 1) * EPISODES / (counted[-1] - counted[0])
