"""What the comparisons of PPO and GRPO with TRL share: the prompts, our recipe, and what TRL's trainers are told."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HH = ROOT.parent / "shared" / "data" / "hh_harmless" / "rows_0_1499.jsonl"
TEMPLATE = ROOT / "data_templates" / "prompts.jsonl"
EPISODES, NEW, SHORTEST, LONGEST = 16, 48, 16, 192  # of an update; tokens of responses and prompts
RANK, ALPHA, RATE = 8, 16, 1e-5


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


class ForTrl(NamedTuple):
    """What TRL's side needs of ours."""

    recipe: Any
    tokenizer: Any
    ids: list[list[int]]  # of the prompts of all updates, in their order
    talks: list[list[dict]]  # the same as messages


def for_trl(spec: dict, stage: ModuleType, own: dict) -> ForTrl:
    """The same prompts in the same order; `own`: of the stage's section."""
    import torch

    from align.data.formats.prompts import asked, prompts
    from align.data.mixture import prepare
    from align.models.base import load_tokenizer
    from align.models.demo import cache_folder
    from align.training.plan import Plan

    torch.set_num_threads(spec["threads"])
    name = stage.__name__.removeprefix("align.")
    recipe = stage.Recipe.model_validate(sampling_recipe(spec, name, own, Path(spec["work"]) / "unused"))
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe.data, tokenizer, prompts(), 0, cache_folder()).train
    plan, rows = Plan(recipe, data), asked(data)
    chosen = [int(i) for step in range(1, spec["updates"] + 1) for i in plan.batch(step)]
    ids = [data.tree(i).segments[0].tolist() for i in chosen]
    tokenizer.padding_side = "left"
    return ForTrl(recipe, tokenizer, ids, [rows[i].messages for i in chosen])


def options(spec: dict) -> dict[str, Any]:
    """What both of TRL's trainers are told."""
    rows = spec["setting"]["rows"]
    return {
        "output_dir": spec["work"], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "save_strategy": "no", "learning_rate": RATE, "lr_scheduler_type": "constant", "disable_tqdm": True,
        "dataloader_pin_memory": False, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": EPISODES // rows,
    }  # fmt: skip


def lora(task: str) -> Any:
    """TRL's, as ours."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type=task)


def trained(spec: dict, trainer: Any) -> float:
    """Have TRL train: its episodes per second."""
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args: object, **_options: object) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_args: object, **_options: object) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    if spec["setting"].get("adapters") == "bfloat16":
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    assert len(ends) == spec["updates"] + 1, "an update is a step"
    return rate(ends, spec["updates"])


def rate(ends: list[float], updates: int) -> float:
    """Episodes per second between the ends of updates, the first of which is when training began. A trial's only update
    counts whole, else the first does not."""
    counted = ends if updates == 1 else ends[1:]
    return (len(counted) - 1) * EPISODES / (counted[-1] - counted[0])
