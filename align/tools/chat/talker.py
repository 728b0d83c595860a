"""A model to talk with, by its name alone: a checkpoint, or what a run left, on the trunk that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from align.models.base import load_tokenizer
from align.models.checkpoints.adapters import trunk_of
from align.models.checkpoints.results import CONFIG
from align.models.checkpoints.sources import is_file, is_folder
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.schema import Model
from align.tools.evaluation.policy import load_policy, read_policy

IN_ORDER = "name the base, and after it every adapter in the order of training: BASE --adapter SFT/final --adapter …"


def load_talker(
    name: str, adapters: Sequence[str], accelerator: Accelerator, trust: bool = False, dtype: str = "auto"
) -> Trunk:
    """What `name` is, with `adapters` on it in the order of training; the last one acts, the others are merged.

    A result brings its base and what was merged into it, as its files tell, where they are on this machine. `trust`:
    code beside a base may run; no file of a result can ask for it. Raises UserError for what is not there, does not
    belong together, or only scores.
    """
    result = result_folder(name)
    if is_file(result / CONFIG):
        if adapters:
            raise UserError(f"{name} is an adapter itself; {IN_ORDER}")
        base, adapters = None, [str(result)]
    else:
        base = str(result) if is_folder(result) else name
    with _without_recipe():
        if not adapters:
            return load_policy(Model(base=base, dtype=dtype, trust_remote_code=trust), None, accelerator, 0)
        saved = read_policy(adapters[-1])
        model = trunk_of(saved, "policy", IN_ORDER, base, trust, list(adapters[:-1]))
        model = model.model_copy(update={"dtype": dtype})
        trunk = load_policy(model, saved, accelerator, 0)
        trunk.tokenizer = load_tokenizer(model.model_copy(update={"adapter": str(saved.folder)}))  # with its template
    return trunk


def result_folder(name: str) -> Path:
    """The folder that is meant; of a run its `final/`."""
    folder = Path(name)
    for there in (folder, folder / "final"):
        if is_file(there / CONFIG) or is_file(there / "config.json"):
            return there
    if is_file(folder / "recipe.yaml"):
        raise UserError(f"{name} is a run without a final/: it has not finished; run its recipe to the end")
    return folder


@contextmanager
def _without_recipe() -> Iterator[None]:
    """Problems speak of keys of a recipe, and here is none."""
    try:
        yield
    except UserError as error:
        problems = [re.sub(r"^(policy|model\.(base|adapter)): ", "", problem) for problem in error.problems]
        told = [f"{p.partition('; ')[0]}; {IN_ORDER}" if "on a trunk with" in p else p for p in problems]
        raise UserError(*told) from None
