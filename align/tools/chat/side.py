"""Answers of several models side by side: columns on a terminal that is wide enough, else one below the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from align.recipe.errors import printable

NARROW = 30  # characters of a column, below which columns are of no use


class Columns:
    """Answers that grow. On a terminal their last lines are shown meanwhile; at the end everything is printed once."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.texts = [printable(name) for name in names], [""] * len(names)
        self.notes = [""] * len(names)
        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=False)
        self.live = Live(console=self.console, transient=True, auto_refresh=False)

    def __enter__(self) -> Columns:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self.live.is_started:
            self.live.stop()
        if kind is None:
            self._print()

    def say(self, column: int, piece: str) -> None:
        """More of one answer."""
        self.texts[column] += printable(piece)
        if self.live.is_started:
            self.live.update(self._table(self.console.height - 4), refresh=True)

    def _print(self) -> None:
        if self.console.width // len(self.names) >= NARROW:
            self.console.print(self._table())
            return
        for name, text, note in zip(self.names, self.texts, self.notes, strict=True):
            self.console.print(Text(f"--- {name}\n{text}\n{note}".rstrip()))

    def _table(self, most: int | None = None) -> Table:
        """`most`: lines of each answer, its last ones."""
        table = Table(expand=True, show_lines=False, padding=(0, 1))
        for name in self.names:
            table.add_column(Text(name), ratio=1, overflow="fold", vertical="top")
        width = self.console.width // len(self.names) - 4
        cells = [Text(text) for text in self.texts]
        if most is not None:
            cells = [Text("\n").join(cell.wrap(self.console, max(width, 1))[-most:]) for cell in cells]
        table.add_row(*cells)
        if any(self.notes):
            table.add_row(*(Text(note, style="dim") for note in self.notes))
        return table
