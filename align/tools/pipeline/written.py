"""Values that know where they were written: laid over each other and typed, while every fault keeps its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from align.recipe.document import Document, Keys, Place, spoken
from align.recipe.errors import UserError
from align.recipe.load import problems_of


class Node(NamedTuple):
    """A value of a recipe and its place: a mapping of names to nodes, a list of nodes, or a scalar."""

    value: Any
    place: Place

    @classmethod
    def of(cls, document: Document, value: Any = None, keys: Keys = ()) -> Node:
        """The whole document, or what stands at `keys` in it."""
        value = value if keys else document.values
        if isinstance(value, dict):
            value = {key: cls.of(document, below, (*keys, key)) for key, below in value.items()}
        elif isinstance(value, list):
            value = [cls.of(document, below, (*keys, i)) for i, below in enumerate(value)]
        return cls(value, document.place(keys))

    def over(self, below: Node) -> Node:
        """This one laid over another: sections are joined, key by key; anything else replaces what was there."""
        if not (isinstance(self.value, dict) and isinstance(below.value, dict)):
            return self
        joined = {k: v.over(below.value[k]) if k in below.value else v for k, v in self.value.items()}
        return Node(below.value | joined, self.place)

    def put(self, keys: Sequence[str], new: Node) -> Node:
        """With `new` at these keys; list items go by index. Raises UserError where nothing can stand there."""
        if not keys:
            return new
        key, *rest = keys
        if isinstance(self.value, list):
            if not key.isdecimal() or int(key) >= len(self.value):
                raise UserError(f"{new.place.where}: there is no item {key!r} in a list of {len(self.value)}")
            items = [item.put(rest, new) if i == int(key) else item for i, item in enumerate(self.value)]
            return Node(items, self.place)
        if not isinstance(self.value, dict | None):
            raise UserError(f"{new.place.where}: {key!r} would stand below {spoken(self.value)}")
        inside = self.value or {}
        return Node(inside | {key: inside.get(key, Node(None, new.place)).put(rest, new)}, self.place)


class Written(Document):
    """A tree of nodes as a document: plain `values`, and the `places` of all of them."""

    def __init__(self, tree: Node) -> None:
        self.places: dict[Keys, Place] = {}
        self.values = self._plain(tree, ())

    def _plain(self, tree: Node, keys: Keys) -> Any:
        self.places[keys] = tree.place
        if isinstance(tree.value, dict):
            return {key: self._plain(below, (*keys, key)) for key, below in tree.value.items()}
        if isinstance(tree.value, list):
            return [self._plain(below, (*keys, i)) for i, below in enumerate(tree.value)]
        return tree.value

    def typed(self, kind: type[BaseModel]) -> BaseModel:
        """As a recipe of this type. Raises UserError with every problem and its line."""
        try:
            return kind.model_validate(self.values)
        except ValidationError as error:
            found = sorted(problems_of(error, kind, self), key=lambda problem: problem.order)
            raise UserError(*dict.fromkeys(problem.text for problem in found)) from None


@contextmanager
def gathering(problems: list[str]) -> Iterator[None]:
    """What a user has to mend is added to `problems`, and work goes on behind the block."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def meant(word: str, known: Sequence[str]) -> str:
    """What a user may have meant by an unknown word, or all that there is."""
    close = get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
