"""`${name}` in a recipe: the result of an earlier stage.

`${sft}` is a path; `${ppo.best}` that of the best checkpoint; `${dpo[beta=0.1]}` that of one point of a sweep. `${dpo}`
of a whole sweep is a list of paths, and within a list it repeats the item that it stands in, once for each point.
`$${x}` is the text `${x}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from align.recipe.errors import UserError
from align.tools.pipeline.stage import Stage
from align.tools.pipeline.written import Node, gathering, meant

REFERENCE = re.compile(r"(\$?)\$\{([^{}]*)\}")
PARTS = re.compile(r"([^\[\].]*)(\[[^\]]*\])?(?:\.(.*))?")
UNFILLED = "$?"  # in the place of a reference that has a problem
Points = dict[str, list[Stage]]  # the stages that a name stands for


def names(node: Node, lists: bool = True) -> Iterator[tuple[str, str]]:
    """Every name referred to below a node, with its place; without those in `lists`, if so asked."""
    if isinstance(node.value, dict) or (isinstance(node.value, list) and lists):
        for below in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from names(below, lists)
    elif isinstance(node.value, str):
        for escaped, inside in REFERENCE.findall(node.value):
            if not escaped:
                yield inside.partition("[")[0].partition(".")[0], node.place.where


class Filling:
    """Puts paths where references stand, and notes whose they are in `after`.

    `bound` are the points that a stage itself belongs to: there, the name of a sweep is one path.
    """

    def __init__(self, points: Points, bound: dict[str, Stage], problems: list[str]) -> None:
        self.points, self.bound, self.problems = points, bound, problems
        self.after: dict[str, None] = {stage.name: None for stage in bound.values()}

    def fill(self, node: Node) -> Node:
        """The node without references."""
        value = node.value
        if isinstance(value, dict):
            value = {key: self.fill(below) for key, below in value.items()}
        elif isinstance(value, list):
            value = [filled for item in value for filled in self._items(item)]
        elif isinstance(value, str) and REFERENCE.search(value):
            value = UNFILLED
            with gathering(self.problems):
                paths = self._paths(node)
                value = paths[0] if not self._sweeps(node) else [Node(path, node.place) for path in paths]
        return Node(value, node.place)

    def _items(self, item: Node) -> Iterator[Node]:
        """An item of a list: once for each point of a sweep that it names."""
        if not (sweeps := self._sweeps(item)):
            yield self.fill(item)
            return
        name = max(sweeps, key=lambda name: len(self.points[name][0].bound))  # it may bind others
        for point in self.points[name]:
            inner = Filling(self.points, {**self.bound, name: point, **point.bound}, self.problems)
            yield from inner._items(item)
            self.after |= inner.after

    def _sweeps(self, node: Node) -> list[str]:
        """The sweeps named in it that are not bound."""
        found = (self.points.get(name) for name, _ in names(node, lists=False) if name not in self.bound)
        return [stages[0].name.partition("[")[0] for stages in found if stages and stages[0].label]

    def _paths(self, node: Node) -> list[str]:
        """The text with its references replaced, for each point of a sweep."""
        text: str = node.value
        found = REFERENCE.fullmatch(text)
        if found and not found[1]:
            return [str(path) for path in self._results(found[2], node)]

        def path(found: re.Match) -> str:
            if found[1]:
                return found[0][1:]
            results = self._results(found[2], node)
            if len(results) > 1:
                what = f"{found[0]} is a sweep of {len(results)} stages"
                raise UserError(f"{node.place.where}: {what}; let it stand alone, or in an item of a list")
            return results[0]

        return [REFERENCE.sub(path, text)]

    def _results(self, inside: str, node: Node) -> list[str]:
        where = node.place.where
        parts = PARTS.fullmatch(inside)
        if not parts:
            raise UserError(
                f"{where}: ${{{inside}}} names no stage; write ${{name}}, ${{name[point]}} or ${{name.best}}"
            )
        name, point, part = parts.groups()
        stages = [self.bound[name]] if name in self.bound and not point else self.points.get(name, [])
        if point and stages:
            known = [stage.name for stage in stages]
            stages = [stage for stage in stages if stage.name == name + point]
            if not stages:
                raise UserError(f"{where}: no stage is named {name + point!r}; {meant(name + point, known)}")
        if part and part != "best":
            raise UserError(f"{where}: ${{{inside}}}: `.best` is all that may follow a name")
        if part and (without := next((stage.name for stage in stages if not stage.keeps_best), None)):
            raise UserError(f"{where}: ${{{inside}}}: {without} keeps no `best/`; give it `train.best`")
        self.after |= dict.fromkeys(stage.name for stage in stages)
        return [str(stage.folder / "best" if part else stage.result) for stage in stages] or [inside]
