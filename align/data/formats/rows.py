"""What a row is: canonical, at fault, or not yet read; and what a format's rows look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from align.data.formats.shown import listed


class Refused(Exception):
    """Why the row at hand cannot be taken."""


class Row(NamedTuple):
    """One example as every stage takes it. Exactly one of `messages` and `text` is set.

    A conversation ends with an assistant's turn; where there are `answers`, it is the prompt before them.
    """

    file: str
    line: int  # 1-based line where the row starts; for Parquet and hub sets the row's number
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list[dict[str, Any]] | None  # each {"type": "function", "function": {"name": str, …}}
    repairs: tuple[str, ...] = ()  # what was changed so that the row could be taken
    answers: tuple[dict[str, Any], ...] = ()  # assistant messages that each could come next, the best first
    targets: tuple[float, ...] = ()  # one for each answer, as `Tree.targets`; or none
    label: str | None = None  # the class of a text
    control: bool = False  # whether what looks like a control token in its words is one
    remarks: tuple[str, ...] = ()  # what is to be said once a file, with the number of rows that it is true of


class Fault(NamedTuple):
    """A row that cannot be taken."""

    file: str
    line: int
    reason: str  # the field, what was expected, what was found


class Shape(NamedTuple):
    """What a format's rows look like."""

    needs: tuple[str, ...]  # columns
    may: tuple[str, ...]  # further columns
    keys: tuple[str, ...]  # of each turn, where the first column is a list of turns, or how a transcript's begin
    read: Callable[[dict[str, Any]], Row]  # a row without its place; raises Refused
    either: tuple[str, ...] = ()  # columns of which one is needed besides
    also: Mapping[str, str] = {}  # other names that data sets give to columns, each with the format's own
    note: str = ""  # to be said of a file in this format
    when: Callable[[dict[str, Any]], bool] = bool  # what some row must be besides, for `auto` to take it

    @property
    def wanted(self) -> str:
        """The columns that it needs, in words."""
        parts = [listed(self.needs)] * bool(self.needs) + [f"one of {listed(self.either)}"] * bool(self.either)
        return " and ".join(parts) + (f" with {'/'.join(self.keys)}" if self.keys else "")

    def named(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its columns under the format's own names."""
        if not self.also.keys() & row.keys():
            return row
        return {self.also[name]: value for name, value in row.items() if name in self.also} | row


Formats = Mapping[str, Shape]  # the most structured first: the order in which `detect` prefers them
