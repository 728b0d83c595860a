"""A recipe as it was written: values from YAML, each with the place it stands, and overrides set on top.

The YAML is a plain subset: text, numbers, true/false, null, lists, mappings, anchors. No tags, so no
objects. Keys are always text, and `5e-7` is a number (plain YAML 1.1 reads it as text).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from align.recipe.errors import UserError, brief
from align.recipe.text import recipe_text

Keys = tuple[str | int, ...]  # ("data", "train", 0, "path")

FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+")
MAX_DEPTH, MAX_VALUES = 32, 20_000
UNQUOTED = re.compile(r"alias|anchor|cannot start any token")  # what YAML takes their first character for
LONG = 64  # characters of a text that count as one value more
Pair = tuple[yaml.Node, yaml.Node]


class Place(NamedTuple):
    """Where a value was written, and how."""

    order: int  # its line in the file; overrides come after every line
    where: str  # "recipes/dpo.yaml:14", or "override 'optim.eps=3'"
    written: str = ""  # a plain scalar as it stands there


class Problem(NamedTuple):
    """One line of a UserError; problems are shown in the order of the file."""

    order: int
    text: str


class _Loader(yaml.SafeLoader):
    """YAML nodes with their lines; the values are read by `_Reader`, never by PyYAML's constructors."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own attribute, filled below)
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, "tags (!) have no meaning in a recipe", event.start_mark)
        if self.depth == MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for tag, pattern, first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?i:yes|no|true|false|on|off)"), list("yYnNtTfFoO")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern.pattern})$"), first)


class _Reader:
    """Turns one piece of YAML into values, places and problems."""

    def __init__(self, order: Callable[[int], int], where: Callable[[int], str]) -> None:
        self.order, self.where = order, where  # both from a line number
        self.places: dict[Keys, Place] = {}
        self.problems: list[Problem] = []
        self.size = 0  # values that were read, those that anchors repeat included; a long text counts as several

    def read(self, text: str, keys: Keys = ()) -> Any:
        """The value that `text` holds, to stand at `keys`. Raises UserError where it is not YAML."""
        line = 1
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
            except (ValueError, OverflowError) as error:  # an escape or version number out of range
                raise ComposerError(None, None, str(error), loader.get_mark()) from None
        except ReaderError as error:
            line, fault = text.count("\n", 0, error.position) + 1, f"the character {chr(error.character)!r}"
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, fault = mark.line + 1, ", ".join(filter(None, (error.context, error.problem)))
            if UNQUOTED.search(fault):
                fault += "; a text that begins with * & ! % @ or ` stands in quotes"
        else:
            if node is None:  # nothing but space and comments
                self.places[keys] = self._place(1)
                return None
            return self._value(node, keys, node.start_mark.line + 1)
        raise UserError(f"{self.where(line)}: this is not YAML: {fault}")

    def _place(self, line: int, written: str = "") -> Place:
        return Place(self.order(line), self.where(line), written)

    def _fault(self, line: int, text: str) -> None:
        self.problems.append(Problem(self.order(line), f"{self.where(line)}: {text}"))

    def _value(self, node: yaml.Node, keys: Keys, line: int) -> Any:
        self._grow(line, len(node.value) // LONG if isinstance(node, yaml.ScalarNode) else 0, len(keys))
        self.places[keys] = self._place(line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(n, (*keys, i), n.start_mark.line + 1) for i, n in enumerate(node.value)]
        if node.style is None:
            self.places[keys] = self._place(line, node.value)
        return self._scalar(node, line)

    def _grow(self, line: int, more: int = 0, depth: int = 0) -> None:
        """Count a value. A few anchors can unfold without end."""
        self.size += 1 + more
        if self.size > MAX_VALUES or depth > 2 * MAX_DEPTH:
            raise UserError(f"{self.where(line)}: the anchors unfold into too much; write the values out")

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values, first = {}, {}
        own, merged = self._pairs(node, keys)
        for key_node, value_node in own:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not encodable(key):
                self._fault(line, f"a key in {dotted(keys)} is not text")
            elif key in values:
                self._fault(line, f"duplicate key {key!r} in {dotted(keys)}; it already stands on line {first[key]}")
            else:
                values[key], first[key] = self._value(value_node, (*keys, key), line), line
        for key_node, value_node in merged:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key not in values and isinstance(key_node, yaml.ScalarNode) and encodable(key):
                values[key] = self._value(value_node, (*keys, key), line)
        return values

    def _pairs(self, node: yaml.MappingNode, keys: Keys, depth: int = 0) -> tuple[list[Pair], list[Pair]]:
        """A mapping's own keys with their values, and those that its merge key (`<<`) brings, which come after them.

        The value of `<<` is a mapping, or a list of mappings of which the first counts most (yaml.org/type/merge.html).
        """
        own, merged = [], []
        for pair in node.value:
            key_node, value_node = pair
            line = key_node.start_mark.line + 1
            if depth:
                self._grow(line, depth=depth)
            if key_node.value != "<<" or key_node.style is not None:
                own.append(pair)
                continue
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in sources:
                if isinstance(source, yaml.MappingNode):
                    merged += [inner for pairs in self._pairs(source, keys, depth + 1) for inner in pairs]
                else:
                    self._fault(line, f"`<<` in {dotted(keys)}: expected a section to merge, such as `<<: *name`")
        return own, merged

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        text = node.value
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return text.lower() in ("yes", "true", "on")
            case "int" if len(text) < 19:
                return int(text)
            case "float" if abs(float(text)) < float("inf"):
                return float(text)
            case "int" | "float":
                raise UserError(f"{self.where(line)}: the number {text[:40]} is too large")
            case _ if not encodable(text):
                raise UserError(f"{self.where(line)}: the text {text[:40]!r} holds half a character")
        return text


class Document:
    """A recipe file with overrides set on top: `values`, their `places`, and the `problems` so far."""

    def __init__(self, path: Path) -> None:
        reader = _Reader(order=int, where=lambda line: f"{path}:{line}")
        self.path, self.places, self.problems = path, reader.places, reader.problems
        self.values = reader.read(recipe_text(path))
        if self.values is None:
            raise UserError(f"{path}: the file is empty; a recipe needs at least stage, run, model and data")
        if not isinstance(self.values, dict):
            raise UserError(
                f"{self.place(()).where}: a recipe is a mapping of `key: value` lines at its top level, "
                f"found {spoken(self.values)}"
            )

    def place(self, keys: Keys) -> Place:
        """Where the value at `keys` stands, or else the nearest section around it."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def override(self, number: int, text: str) -> None:
        """Set one `key.path=value`; list items go by index, and the index after the last appends."""
        here = Place(10**9 + number, f"override {brief(text)!r}")
        try:
            self._override(here, text)
        except UserError as error:
            self.problems += [Problem(here.order, problem) for problem in error.problems]

    def _override(self, here: Place, text: str) -> None:
        name, equals, written = text.partition("=")
        parts = name.split(".")
        if not equals or not all(parts):
            raise UserError(f"{here.where}: write it as key.path=value, such as optim.learning_rate=1e-4")
        inside, keys = self.values, ()
        for part, after in zip(parts, [*parts[1:], None], strict=True):
            key = _index(part, inside, keys, here) if isinstance(inside, list) else part
            if isinstance(inside, list) and key == len(inside):
                inside.append(None)
            keys = (*keys, key)
            if after is None:
                break
            if (inside[key] if isinstance(inside, list) else inside.get(key)) is None:
                inside[key] = [] if after.isdecimal() else {}
                self.places[keys] = here
            inside = inside[key]
            if not isinstance(inside, dict | list):
                raise UserError(f"{here.where}: {dotted(keys)} is {spoken(inside)}, so nothing stands below it")
        reader = _Reader(order=lambda line: here.order, where=lambda line: here.where)
        inside[key] = reader.read(written, keys)
        outside = {k: place for k, place in self.places.items() if k[: len(keys)] != keys}
        self.places = outside | reader.places
        self.problems += reader.problems


def _index(part: str, items: list, keys: Keys, here: Place) -> int:
    if re.fullmatch(r"[0-9]{1,6}", part) and int(part) <= len(items):
        return int(part)
    raise UserError(
        f"{here.where}: {dotted(keys)} is a list of {len(items)}: give an index from 0 to {len(items)} "
        f"({len(items)} appends), found {part!r}"
    )


def dotted(keys: Keys) -> str:
    """The path of a value as an override writes it."""
    return ".".join(map(str, keys)) or "the recipe"


def encodable(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    return not re.search("[\ud800-\udfff]", text)


def is_text_only_in_quotes(text: str) -> bool:
    """Whether YAML would read it as a number, a boolean or null if it stood there plainly."""
    return _Loader("").resolve(yaml.ScalarNode, text, (True, False)) != "tag:yaml.org,2002:str"


def spoken(value: Any) -> str:
    """A value in plain words, for an error."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value if len(value) <= 60 else value[:57] + '…'!r}"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "a section"
