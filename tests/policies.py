"""Policies for tests, adapters with a random update in a run folder, and recipes of align.evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from world import align

from align import evaluate
from align.models.base import load_base
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model


def make_policy(base: Path, run: Path, spread: float = 0.3, stage: str = "dpo", seed: int = 0) -> Path:
    """`final/` of a run that never was: its adapter moves every weight at random."""
    model = Model(base=str(base), dtype="float32")
    trunk = Trunk(load_base(model, torch.device("cpu"), frozen=True), model, Lora(r=2, alpha=4), seed)
    draw = torch.Generator().manual_seed(seed)
    weights = {name: p.detach() for name, p in trunk.named_parameters() if p.requires_grad}
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.normal_(0, spread, generator=draw)
    trunk.save(run / "final", weights, {"stage": stage})
    return run / "final"


def make_costs(run: Path, recipe: dict, records=()) -> None:
    """What else stands in the folder of a run that was trained by 2 processes for 30 s."""
    needed = {"run": str(run), "model": {"base": "base"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(needed | recipe))
    (run / "summary.json").write_text(
        json.dumps({"steps": len(records), "train_seconds": 30.0, "peak_memory_bytes": 123})
    )
    (run / "environment.json").write_text(json.dumps({"processes": 2}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation(folder: Path, base: Path, rows: Path, policy: Path | None = None, **sections) -> Path:
    """The path of a recipe whose run is `folder`; `sections` are merged into it."""
    recipe = {
        "stage": "evaluate",
        "run": str(folder),
        "seed": 3,
        "model": {"base": str(base), "dtype": "float32"},
        "policy": policy and str(policy),
        "data": {"train": [{"path": str(rows)}]},
        "evaluate": {"samples": 2, "generation": {"max_new": 3}},
    }
    for name, section in sections.items():
        recipe[name] = recipe[name] | section if isinstance(recipe.get(name), dict) else section
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def evaluated(*given, **sections) -> tuple[dict, list[dict]]:
    """evaluation.json and responses.jsonl of an evaluation that succeeds."""
    told = align(evaluation(*given, **sections), stage=evaluate)
    assert (told.status, told.err) == (0, ""), told.err
    return results(given[0])


def results(folder: Path) -> tuple[dict, list[dict]]:
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text("utf-8").splitlines()]
    return json.loads((folder / "evaluation.json").read_text("utf-8")), rows
