"""What a step of preparation is.

Rows go through the steps in batches of consecutive rows, whose bounds depend on the input alone. Three kinds of steps:

- a `RowStep` looks at each row by itself and keeps it, changes it or drops it. It runs in worker processes, on batches
  in any order.
- a `SetStep` looks at all rows that the row steps left, in two passes. First it makes a *sketch* of each row, batch by
  batch, in the workers (or, where it holds a model, in the main process). Then it *decides* in one place over the
  sketches of all rows in their order.
- an `Observer` changes nothing. It counts, batch by batch, and its counts are merged in the order of the batches.

All three are functions of what they are given and of the recipe's seed, so the result has the same bytes whatever the
number of workers or the engine. A step is made anew in each worker from the recipe; it may load what it needs on first
use. What it reports is printed, written and shown as it is: it must hold no private value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from align.data.formats.rows import Fault, Row

Kind = Literal["messages", "text", "pairs", "ranked", "labelled", "classes", "prompts"]
Sketch = Mapping[str, np.ndarray]


class Item(NamedTuple):
    """A row on its way through the steps."""

    number: int  # its place among all records of all sources, from 0; records at fault are counted too
    source: int  # place of its source in the recipe
    kind: Kind  # what is written of it
    row: Row  # canonical; `row.file` and `row.line` say where it stands
    record: dict[str, Any]  # the columns that the recipe keeps or that steps are told to read, as the file has them


class Verdict(NamedTuple):
    """What a row step says of one row. Made by `keep`, `change` and `drop`."""

    item: Item | None  # as it goes on; None where it is dropped
    reason: str = ""  # in a few words why it is dropped: the same words for all rows that the same rule takes
    counts: Mapping[str, int] = {}  # what was found in it, by name: {"EMAIL": 2}
    example: str = ""  # a short excerpt or number for the report


def keep(item: Item) -> Verdict:
    """The row goes on as it is."""
    return Verdict(item)


def change(item: Item, counts: Mapping[str, int], example: str = "") -> Verdict:
    """The row goes on as `item`, which is not what it was."""
    return Verdict(item, "", counts, example)


def drop(reason: str, example: str = "") -> Verdict:
    """The row goes no further."""
    return Verdict(None, reason, {reason: 1}, example)


class RowStep(Protocol):
    """A stateless function of rows."""

    name: str  # the key of the recipe that asks for it: `filter.min_words`

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, each a function of that item alone. Raises UserError for what the user can mend."""
        ...


class Sketches(Protocol):
    """The sketches that one set step made of all n rows that came so far, on disk."""

    number: np.ndarray  # (n,) int64, ascending: `Item.number`
    source: np.ndarray  # (n,) int16: `Item.source`

    def __len__(self) -> int: ...

    def __getitem__(self, name: str) -> np.ndarray:
        """(n, …), memory-mapped: what `sketch` gave under this name."""
        ...

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, memory-mapped, of all rows, one after the other; (n + 1,) int64 where each row's begin)."""
        ...


class Decision(NamedTuple):
    """What a set step says of all n rows. Whatever is None changes nothing."""

    drop: np.ndarray | None = None  # (n,) int8: 0 where the row stays, else 1 + the place of why in `reasons`
    reasons: tuple[str, ...] = ()
    because: np.ndarray | None = None  # (n,) int64: the row, by its place among the n, that this one repeats, or -1
    group: np.ndarray | None = None  # (n,) int64: rows of one number must come on one side of the split
    times: np.ndarray | None = None  # (n,) int32: how often the row is written
    side: np.ndarray | None = None  # (n,) int8: place in `sides`
    sides: tuple[str, ...] = ()
    cuts: tuple[np.ndarray, np.ndarray] | None = None  # (values, starts): of each row, what `edit` is told
    counts: Mapping[str, Any] = {}  # for the report, as JSON can hold it


class SetStep(Protocol):
    """A decision over all rows."""

    name: str  # as RowStep's
    where: Literal["workers", "main"]  # which processes sketch
    raw: bool  # whether it sketches rows with their records as the file has them, before anything is masked

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """Arrays by name, each (len(items), …); or ragged: `name` holds the values of all rows one after the other, and
        `name/counts`, (len(items),) int64, how many each has. The same names and dtypes for any batch."""
        ...

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """Of all rows; `alive`, (n,) bool, is False where an earlier set step has dropped one, and `group`, (n,) int64,
        is what earlier ones keep together. Memory must not grow with more than a few numbers a row."""
        ...

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """The row without what the decision's `cuts` name; called only where they name something."""
        ...


class Observer(Protocol):
    """Counts rows: as they were read, and as they are written."""

    name: str

    def observe(self, items: Sequence[Item], faults: Sequence[Fault]) -> dict[str, Any]:
        """Of one batch, as JSON can hold it, and small."""
        ...

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of all batches, in their order."""
        ...
