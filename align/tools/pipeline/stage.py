"""One stage of a pipeline: a run in a folder of its own, and what others call its result."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pydantic import BaseModel

from align.recipe.load import STAGES

# and the file that each leaves last
TOOLS = {"prepare": "manifest.json", "evaluate": "evaluation.json", "compare": "compare.json"}
KINDS = (*STAGES, *TOOLS)


@dataclass(frozen=True)
class Stage:
    """A stage with all its inputs named."""

    name: str  # dpo, or dpo[beta=0.1,seed=2] of a sweep
    kind: str
    folder: Path
    where: str  # it stands in the pipeline's file
    recipe: BaseModel | None  # None where that has a problem
    after: tuple[str, ...]  # the stages whose results it takes
    bound: dict[str, Stage]  # with `each`: the points that it belongs to, by the names of their sweeps

    @property
    def label(self) -> str:
        """Which point of its sweep it is; empty where there is none."""
        return self.name.partition("[")[2].removesuffix("]")

    @property
    def slug(self) -> str:
        """Its name as that of a file."""
        return slug(self.name)

    @property
    def result(self) -> Path:
        """What `${name}` stands for."""
        return self.folder if self.kind in TOOLS else self.folder / "final"

    @property
    def keeps_best(self) -> bool:
        """Whether it leaves `best/`, as far as is known."""
        if self.recipe is None:
            return self.kind not in TOOLS
        return getattr(getattr(self.recipe, "train", None), "best", None) is not None

    @property
    def mark(self) -> Path:
        """What it leaves last: it says that the stage has come to its end."""
        return self.folder / TOOLS.get(self.kind, "final")


def slug(name: str) -> str:
    """A stage's name as that of a file: without brackets, which shells and globs read."""
    return name.replace("[", "-").removesuffix("]")


def recipe_type(kind: str) -> type[BaseModel]:
    """The recipe of a stage or tool."""
    return import_module(f"align.{kind}").Recipe
