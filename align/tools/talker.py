"""A model to talk with, by its name alone: a checkpoint, or what a run left, on the trunk that it was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from align.models.base import load_tokenizer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.load import STAGES, load_recipe
from align.recipe.schema import Model
from align.tools.policy import Saved, load_policy, read_policy
from align.tools.stage import recipe_type

IN_ORDER = "name the base, and after it every adapter in the order of training: BASE --adapter SFT/final --adapter …"


def load_talker(name: str, adapters: Sequence[str], accelerator: Accelerator) -> Trunk:
    """What `name` is, with `adapters` on it in the order of training; the last one acts.

    A result brings its base and what was merged into it, as its run's recipe or its own files tell. Raises UserError
    for what is not there, does not belong together, or only scores.
    """
    result = _result(name)
    if (result / "adapter_config.json").is_file():
        if adapters:
            raise UserError(f"{name} is an adapter itself; {IN_ORDER}")
        base, adapters = None, [str(result)]
    else:
        base = str(result) if result.is_dir() else name
    if len(adapters) > 2:
        raise UserError(
            f"--adapter: {len(adapters)} are given, but a trunk takes one earlier adapter and one that acts"
        )
    with _without_recipe():
        if not adapters:
            return load_policy(Model(base=base), None, accelerator, 0)
        saved = read_policy(adapters[-1])
        model = _model_of(saved)
        if base:
            model = model.model_copy(update={"base": base, "revision": None})
        if len(adapters) == 2:
            model = model.model_copy(update={"adapter": adapters[0]})
        trunk = load_policy(model, saved, accelerator, 0)
        trunk.tokenizer = load_tokenizer(Model(base=model.base, adapter=str(saved.folder)))  # with its chat template
    return trunk


def _result(name: str) -> Path:
    """The folder that is meant; of a run its `final/`."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or not (folder / "recipe.yaml").is_file():
        return folder
    if not (folder / "final").is_dir():
        raise UserError(f"{name} is a run without a final/: it has not finished; run its recipe to the end")
    return folder / "final"


def _model_of(saved: Saved) -> Model:
    """The trunk that a result was trained on: from the recipe of the run around it, else from its own files."""
    run, stage, base = saved.folder.parent, saved.about.get("stage"), str(saved.about.get("base"))
    model = Model(base=base)
    if stage in STAGES and (run / "recipe.yaml").is_file():
        model = load_recipe(run / "recipe.yaml", [], recipe_type(stage)).model
        plainly = {"layout": "auto", "gradient_checkpointing": False, "compile": False, "chat_template": None}
        model = model.model_copy(update=plainly)
    if not (model.base.startswith("demo/") or Path(model.base).expanduser().is_dir()):
        # It was relative to another folder, or is a hub id; peft's file has the whole path, or the same id.
        config = json.loads((saved.folder / "adapter_config.json").read_text("utf-8"))
        model = model.model_copy(update={"base": config.get("base_model_name_or_path") or base})
    return model


@contextmanager
def _without_recipe() -> Iterator[None]:
    """Problems speak of keys of a recipe, and here is none."""
    try:
        yield
    except UserError as error:
        problems = [re.sub(r"^(policy|model\.(base|adapter)): ", "", problem) for problem in error.problems]
        told = [f"{p.partition('; ')[0]}; {IN_ORDER}" if "with fingerprint" in p else p for p in problems]
        raise UserError(*told) from None
