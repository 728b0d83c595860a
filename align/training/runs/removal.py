"""Whose a folder is, and how a run goes from it: whole, or not at all.

A run is there as long as its `recipe.yaml` is. To remove it, that file is first renamed into `.old-run/`; from then on
the run is gone, and whatever a kill leaves of its files is removed by the next start. There it stays until the next
run's `recipe.yaml` is written, so that the folder is known to be align's meanwhile.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from align.recipe.errors import UserError
from align.recipe.load import STAGES, dump_recipe
from align.recipe.records import is_there
from align.recipe.schema import BaseRecipe, Section
from align.training.runs.durable import sync

RECIPE, ASIDE = "recipe.yaml", ".old-run"
HEADER = "# The resolved recipe of a run of align. This folder is the run's own: --fresh deletes what it wrote here.\n"
OWN = (
    "environment.json", "metrics.jsonl", "ledger.jsonl", "data.json", "samples.jsonl", "episodes.jsonl",
    "answers.jsonl", "summary.json", "report.html", "classification.json", "tensorboard", "checkpoints", "best",
    "final", "engine",
)  # fmt: skip
CHECKPOINT = re.compile(r"(\.old-|\.writing-)?step-[0-9]{6,}")


def run_recipe(recipe: Section) -> str:
    """What the recipe in the folder of a run, or of a tool, holds."""
    return HEADER + dump_recipe(recipe)


def is_written(file: Path) -> bool:
    """Whether align wrote this recipe. One that a user wrote does not make the folder that it lies in a run's."""
    try:
        return file.is_file() and file.read_bytes().startswith(HEADER.encode())
    except (OSError, ValueError):
        return False


def is_run(folder: Path) -> bool:
    """Whether align wrote a run here."""
    try:
        told = yaml.safe_load((folder / RECIPE).read_text("utf-8")) if is_written(folder / RECIPE) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("stage") in STAGES and BaseRecipe.model_fields.keys() <= told.keys()


def check_own(folder: Path) -> None:
    """UserError where something else than a file or a folder stands in the place of one that a run writes."""
    for name in OWN:
        path = folder / name
        if "." in name:
            is_there(path)
        elif path.exists() and not path.is_dir():
            raise UserError(f"{path}: this is no folder, but a run keeps one there; move it away")


def is_free(folder: Path) -> bool:
    """Whether a run may begin here: nothing is here but what a kill left of a first file, or a run was removed."""
    if (folder / ASIDE / RECIPE).exists():
        return True
    return all(path.name.startswith(".writing-") or path.name == ASIDE for path in folder.iterdir())


def remove_run(folder: Path) -> None:
    """Delete what align wrote in the folder of a run, and nothing else; links are unlinked, never followed.

    `forget_removal` is to follow, as soon as the next run's recipe is written.
    """
    aside = folder / ASIDE
    aside.mkdir(exist_ok=True)
    (folder / RECIPE).replace(aside / RECIPE)
    sync(folder)
    finish_removal(folder)


def finish_removal(folder: Path) -> None:
    """Go on with what a kill interrupted; nothing where there is nothing to do."""
    if (folder / ASIDE / RECIPE).exists():
        for name in OWN:
            for path in (folder / name, folder / f".writing-{name}", folder / f".old-{name}"):
                _delete(path)


def forget_removal(folder: Path) -> None:
    """The next run is there."""
    if (folder / ASIDE).is_dir():
        (folder / ASIDE / RECIPE).unlink(missing_ok=True)
        (folder / ASIDE).rmdir()


def tidy(folder: Path) -> None:
    """Delete what a kill left of results that were being written or replaced."""
    for name in ("best", "final"):
        for path in (folder / f".writing-{name}", folder / f".old-{name}"):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.name == "checkpoints" and path.is_dir():
        for inner in path.iterdir():
            if CHECKPOINT.fullmatch(inner.name):
                _delete(inner)
        if not any(path.iterdir()):  # else somebody keeps something there
            path.rmdir()
    elif path.is_dir():
        shutil.rmtree(path)
