"""The policy that is evaluated: an adapter on the trunk, or the trunk itself; and what its training was and cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from align.models.base import SCORING, about_result, adapter_folder, load_base
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.load import STAGES, load_recipe
from align.recipe.schema import Lora, Model, Section
from align.tools.stage import recipe_type
from align.training.run import Run

NO_UPDATE = Lora(r=1, alpha=1)  # it starts at zero: the trunk itself


class Saved(NamedTuple):
    """An adapter as a training run left it."""

    folder: Path
    about: dict[str, Any]  # align.json
    lora: Lora
    weights: dict[str, Tensor]  # under peft's names in a file


def read_policy(name: str) -> Saved:
    """`final/` or `best/` of a run that trained an adapter to answer; UserError for anything else."""
    folder = adapter_folder(name, "policy", "a finished run that trained a LoRA")
    about = about_result(folder, "policy")
    if about.get("stage") in SCORING:
        raise UserError(f"policy: {folder} is a result of stage {about['stage']}, which only scores texts")
    try:
        config, weights = LoraConfig.from_pretrained(folder), load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"policy: {folder} cannot be loaded ({str(error).splitlines()[0][:200]})") from None
    targets = config.target_modules
    lora = Lora(
        r=config.r,
        alpha=config.lora_alpha,
        targets=targets if targets == "all-linear" else sorted(targets),
        rslora=config.use_rslora,
    )
    return Saved(folder, about, lora, weights)


def load_policy(model: Model, saved: Saved | None, accelerator: Accelerator, seed: int) -> Trunk:
    """The trunk with the policy as its acting adapter. Raises UserError for a policy of another trunk."""
    base = load_base(model, accelerator.device, frozen=True, seed=seed)
    if saved and saved.about.get("fingerprint") != base.fingerprint:
        raise UserError(
            f"policy: {saved.folder} was trained on a trunk with fingerprint {saved.about.get('fingerprint')}, but "
            f"this trunk has {base.fingerprint}; give the model.base and model.adapter that its recipe.yaml names"
        )
    trunk = Trunk(base, model, saved.lora if saved else NO_UPDATE, seed)
    if not trunk.packed:
        why = trunk.layout_reason or "model.layout asks for the padded one"
        raise UserError(f"model.base: responses are sampled in the tree layout, which is not to be had: {why}")
    if saved:
        told = set_peft_model_state_dict(trunk.causal, saved.weights, adapter_name="default")
        lacking = [key for key in told.missing_keys or () if ".default." in key]
        if strange := [*(told.unexpected_keys or ()), *lacking]:
            raise UserError(f"policy: {saved.folder} does not fit this trunk: {strange[0]}")
        if not all(torch.isfinite(weight).all() for weight in saved.weights.values()):
            raise UserError(f"policy: {saved.folder} has weights that are not finite")
    return trunk


def trained(saved: Saved) -> dict[str, Any] | None:
    """How the policy came about and what that cost, from its run's folder; None where there is no run around it."""
    run, stage = saved.folder.parent, saved.about.get("stage")
    if stage not in STAGES or not (run / "recipe.yaml").is_file():
        return None
    recipe = load_recipe(run / "recipe.yaml", [], recipe_type(stage))
    own = getattr(recipe, stage)
    settings = {f"{stage}.{name}": value for name, value in _scalars(own)}
    settings |= {"optim.learning_rate": recipe.optim.learning_rate, "seed": recipe.seed}
    cost, around = _read(run / "summary.json"), _read(run / "environment.json")
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
    if recipe.stage != "ppo":
        return None
    here = Run(recipe.model_copy(update={"run": str(run)}))  # which may have been moved
    records = [record for record in here.records("metrics.jsonl") if record["split"] == "train"]
    if len(records) != steps:
        return None
    each = recipe.batch.examples * recipe.ppo.samples
    return round(sum(record["response_tokens"] * each for record in records))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:
        raise UserError(f"policy: {path} is not whole JSON; mend it, or move it away") from None
