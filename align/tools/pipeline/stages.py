"""From a pipeline's recipe to its stages, in order, each with a typed recipe of its own; or to every problem at once.

A stage is laid together from the file it starts from, what the pipeline shares, and its own keys; then it is multiplied
by its sweep. What it waits for follows from the results that it names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from align.recipe.document import Document
from align.recipe.errors import UserError
from align.recipe.paths import expanded
from align.tools.pipeline.inputs import missing
from align.tools.pipeline.references import Filling, Points, names
from align.tools.pipeline.stage import KINDS, Stage, recipe_type, slug
from align.tools.pipeline.written import Node, Written, gathering, meant

RESERVED = ("stages", "logs")  # folders of the pipeline itself
OWN = {"stage", "run"}  # of each stage
Point = tuple[str, Node, dict[str, Stage]]  # of a sweep: its label, the recipe there, the points it belongs to


class Definition(NamedTuple):
    """A stage as the file has it."""

    kind: str
    tree: Node  # its recipe, references and all
    each: Node | None
    sweep: dict[str, Node]


def stages_of(document: Document, run: Path) -> list[Stage]:
    """Every stage that a pipeline recipe, known to be one, stands for; each after all that it needs.

    Raises UserError with the problems of all of them, each with its line.
    """
    return Planner(document, run).stages()


class Planner:
    """Lays the stages of one recipe together; `problems` are gathered to the end."""

    def __init__(self, document: Document, run: Path) -> None:
        self.run, self.beside = run, document.path.parent
        self.problems = [problem.text for problem in document.problems]
        root = Node.of(document)
        self.written, self.shared = root.value["stages"].value, root.value.get("shared", Node({}, root.place))
        self.definitions: dict[str, Definition] = {}
        self.points: Points = {}

    def stages(self) -> list[Stage]:
        """See `stages_of`."""
        for name, own in self.written.items():
            with gathering(self.problems):
                self.definitions[name] = self._definition(name, own)
        self._check_shared()
        made: list[tuple[Stage, Written]] = []
        for name in self._order():
            definition = self.definitions[name]
            now = [self._stage(name, definition.kind, *point) for point in self._points(definition)]
            self.points[name] = [stage for stage, _ in now]
            made += now
        stages = [stage for stage, _ in made]
        self._check_folders(stages)
        for stage, text in made:
            self.problems += missing(stage.recipe, text, [s.folder for s in stages]) if stage.recipe else []
        if self.problems:
            raise UserError(*dict.fromkeys(self.problems))
        return stages

    def _definition(self, name: str, own: Node) -> Definition:
        where, keys = own.place.where, dict(own.value)
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in RESERVED:
            raise UserError(f"{where}: {name!r} cannot be the name of a stage; take letters, digits, - and _")
        start, each, sweep = (keys.pop(key, None) for key in ("recipe", "each", "sweep"))
        file: dict[str, Node] = {}
        if start and start.value:
            document = Document(self.beside / expanded(start.value))
            self.problems += [problem.text for problem in document.problems]
            file = Node.of(document).value
            file.pop("run", None)
        kinds = [tree["stage"] for tree in (keys, file) if "stage" in tree]
        if not kinds:
            raise UserError(f"{where}: {name!r} has no key 'stage'; it takes {', '.join(KINDS)}")
        kind, at = kinds[0].value, kinds[0].place.where
        if kind not in KINDS:
            raise UserError(f"{at}: there is no stage {kind!r}; {meant(str(kind), KINDS)}")
        if kinds[-1].value != kind:
            raise UserError(f"{at}: stage {kind!r} cannot start from {start.value}, which is of {kinds[-1].value!r}")
        if find_spec(f"align.{kind}") is None:
            raise UserError(f"{at}: stage {kind!r} is not in this version of align; leave {name!r} out")
        known = recipe_type(kind).model_fields.keys() - OWN
        shared = {key: node for key, node in self.shared.value.items() if key in known}
        tree = Node(keys, own.place).over(Node(shared, own.place).over(Node(file, own.place)))
        return Definition(kind, tree, each if each and each.value else None, sweep.value if sweep else {})

    def _check_shared(self) -> None:
        """What no stage can share is a problem, if all stages are known."""
        kinds = {definition.kind for definition in self.definitions.values()}
        known = {key for kind in kinds for key in recipe_type(kind).model_fields} - OWN
        for key, node in self.shared.value.items():
            if key in OWN:
                self.problems.append(f"{node.place.where}: {key!r} is each stage's own and cannot be shared")
            elif key not in known and len(self.definitions) == len(self.written):
                self.problems.append(f"{node.place.where}: unknown key {key!r} in shared; {meant(key, sorted(known))}")

    def _order(self) -> list[str]:
        """Names, each after those it needs; else in the order of the file. Raises UserError for a circle."""
        needs: dict[str, set[str]] = {name: set() for name in self.definitions}
        for name, (_, tree, each, _) in self.definitions.items():
            for needed, where in [*names(tree), *([(each.value, each.place.where)] if each else [])]:
                if needed not in self.written:
                    variable = f"; an environment variable is written ${needed}" if needed in os.environ else ""
                    fault = f"no stage is named {needed!r}; {meant(needed, [*self.written])}{variable}"
                    self.problems.append(f"{where}: {fault}")
                elif needed in self.definitions:
                    needs[name].add(needed)
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            circle = error.args[1]
            told = ", ".join(f"{after!r} needs {before!r}" for before, after in pairwise(circle))
            where = self.definitions[circle[0]].tree.place.where
            raise UserError(*self.problems, f"{where}: stages that wait for each other never start: {told}") from None
        order: list[str] = []
        while len(order) < len(needs):
            order.append(next(name for name in needs if name not in order and needs[name] <= {*order}))
        return order

    def _points(self, definition: Definition) -> Iterator[Point]:
        """Every stage that a definition stands for: one for each combination of values, for each point of `each`."""
        _, tree, each, sweep = definition
        outer: list[Stage | None] = list(self.points.get(each.value, [])) if each else [None]
        if each and any(not point.label for point in outer if point):
            self.problems.append(f"{each.place.where}: each: {each.value!r} has no sweep; leave `each` out")
        ends = [key.rpartition(".")[2] for key in sweep]
        short = [end if ends.count(end) == 1 else key for key, end in zip(sweep, ends, strict=True)]
        seen = set()
        for point in outer:
            for values in product(*(node.value for node in sweep.values())):
                varied, labels = tree, [point.label] if point and point.label else []
                for key, name, value in zip(sweep, short, values, strict=True):
                    with gathering(self.problems):
                        varied = varied.put(key.split("."), value)
                    labels.append(f"{name}={_labelled(value.value)}")
                label = ",".join(labels)
                if label in seen:
                    self.problems.append(f"{values[-1].place.where}: the point {label} is in the sweep twice")
                seen.add(label)
                yield label, varied, {each.value: point, **point.bound} if point else {}

    def _stage(self, name: str, kind: str, label: str, tree: Node, bound: dict[str, Stage]) -> tuple[Stage, Written]:
        name = f"{name}[{label}]" if label else name
        filling = Filling(self.points, bound, self.problems)
        filled = filling.fill(tree)
        filled.value.setdefault("run", Node(str(self.run / slug(name)), tree.place))
        text, recipe = Written(filled), None
        with gathering(self.problems):
            recipe = text.typed(recipe_type(kind))
        folder = Path(recipe.run if recipe else str(text.values["run"]))
        return Stage(name, kind, folder, tree.place.where, recipe, tuple(filling.after), bound), text

    def _check_folders(self, stages: list[Stage]) -> None:
        """Two stages in one folder, or one in the pipeline's own, are problems."""
        taken = {self.run.absolute(): "the pipeline itself"}
        for stage in stages:
            folder = stage.folder.absolute()
            if folder in taken:
                both = f"{stage.name} and {taken[folder]} would both write to {stage.folder}"
                self.problems.append(f"{stage.where}: {both}; name another `run`")
            taken.setdefault(folder, stage.name)


def _labelled(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")[:40]
