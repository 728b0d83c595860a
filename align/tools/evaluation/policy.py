"""The policy that is evaluated: an adapter on the trunk, or the trunk itself; and what its training was and cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from align.models.base import load_base
from align.models.checkpoints.adapters import plain_tokenizer, put, stands_on, stranger, token_names
from align.models.checkpoints.results import SCORING, Result, read_result
from align.models.checkpoints.sources import foreign
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.load import STAGES, load_recipe
from align.recipe.schema import Lora, Model, Section
from align.tools.pipeline.stage import recipe_type
from align.training.runs.run import Run

NO_UPDATE = Lora(r=1, alpha=1)  # it starts at zero: the trunk itself


def read_policy(name: str) -> Result:
    """`final/` or `best/` of a run that trained an adapter to answer; UserError for anything else."""
    result = read_result(name, "policy", "a finished run that trained a LoRA")
    if result.about.stage in SCORING:
        raise UserError(f"policy: {result.folder} is a result of stage {result.about.stage}, which only scores texts")
    return result


def load_policy(model: Model, saved: Result | None, accelerator: Accelerator, seed: int) -> Trunk:
    """The trunk with the policy as its acting adapter. Raises UserError for a policy of another trunk."""
    base = load_base(model, accelerator.device, frozen=True, seed=seed)
    if saved:
        own = tuple(saved.config.tokens)
        if own != base.added:
            tokens = token_names(plain_tokenizer(saved.folder, "policy"), own)
            raise UserError(f"policy: {saved.folder} brings rows of added tokens; give model.add_tokens: {tokens}")
        if not stands_on(saved, base):
            raise UserError(f"policy: {stranger(saved, base, 'this trunk')}")
    trunk = Trunk(base, model, saved.config.section if saved else NO_UPDATE, seed)
    if not trunk.packed:
        why = trunk.layout_reason or "model.layout asks for the padded one"
        raise UserError(f"model.base: responses are sampled in the tree layout, which is not to be had: {why}")
    if saved:
        put(trunk.causal, saved.weights, "default", f"policy: {saved.folder}")
    return trunk


def trained(saved: Result) -> dict[str, Any] | None:
    """How the policy came about and what that cost, from its run's folder; None where there is no run around it."""
    run, stage = saved.folder.parent, saved.about.stage
    if stage not in STAGES or not (run / "recipe.yaml").is_file():
        return None
    recipe = load_recipe(run / "recipe.yaml", [], recipe_type(stage))
    own = getattr(recipe, stage)
    settings = {f"{stage}.{name}": value for name, value in _scalars(own)}
    settings |= {"optim.learning_rate": recipe.optim.learning_rate, "seed": recipe.seed}
    cost, around = _numbers(run / "summary.json"), _numbers(run / "environment.json")
    seconds = cost.get("train_seconds")
    return {
        "run": str(run),
        "stage": stage,
        "settings": settings,
        "device_seconds": seconds and seconds * around.get("processes", 1),
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
        "tokens_sampled": _tokens_sampled(run, cost.get("steps"), recipe),
    }


def _scalars(section: Section) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in section if isinstance(value, bool | int | float | str)]


def _tokens_sampled(run: Path, steps: int | None, recipe: Any) -> int | None:
    """Of all training steps; None where nothing is sampled, or where not every step was logged."""
    here = Run(recipe.model_copy(update={"run": str(run)}))  # which may have been moved
    records = [record for record in here.records("metrics.jsonl") if record["split"] == "train"]
    if len(records) != steps:
        return None
    told = [record["sampled_tokens"] for record in records if "sampled_tokens" in record]
    return sum(told) if told else None


def _numbers(path: Path) -> dict[str, float]:
    """The numbers that stand in a file of a run; none where it is not there."""
    if not path.is_file():
        return {}
    with foreign(f"policy: {path} is not whole JSON; mend it, or move it away"):
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"policy: {path} holds no object; mend it, or move it away")
    return {name: x for name, x in found.items() if isinstance(x, int | float) and math.isfinite(x)}
