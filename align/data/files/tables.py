"""Tables of text: CSV and TSV as numbered records, with what parts their cells told from their first rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from align.data.files.lines import Broken, Record, lines_of
from align.data.files.paths import kind_of, opened
from align.data.formats.shown import shown
from align.recipe.errors import UserError

TABLES = {".csv": ",", ".tsv": "\t"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
PLACE = re.compile(r"column[1-9]\d*")  # a column named by its place
LOOKED_AT = 8  # first rows, by which the delimiter is told


def table(path: Path, columns: Mapping[str, str | None]) -> Iterator[Record]:
    """Cells under the first row's names, or under their places; `columns` as `read_file` takes them."""
    placed = by_place(columns)
    delimiter = delimiter_of(path, placed)
    header: list[str] = []
    for start, cells in (_raw if placed and delimiter == "\t" else _quoted)(path, delimiter):
        if not header:
            header = names = [cell.strip() for cell in cells]
            if placed:
                header = [f"column{i}" for i in range(1, len(cells) + 1)]
                there = dict(zip(header, names, strict=True))
            if not placed or all(there.get(column) in (name, column) for name, column in columns.items() if column):
                if len(set(header)) < len(header):
                    names = shown(", ".join(header), 200)
                    raise UserError(f"{path}:{start}: a column stands twice in the header: {names}")
                continue  # it was a header
        if len(cells) == len(header):
            yield start, dict(zip(header, cells, strict=True))
        else:
            where = "first row" if placed else "header"
            yield start, Broken(f"expected {len(header)} cells as in the {where}, found {len(cells)}")


def by_place(columns: Mapping[str, str | None]) -> bool:
    """Whether the recipe names columns by their places alone, so that a table needs no header."""
    named = [column for column in columns.values() if column]
    return bool(named) and all(map(PLACE.fullmatch, named))


def delimiter_of(path: Path, placed: bool = False) -> str:
    """What parts the cells: what the extension says, unless only another parts the first rows into columns.

    Another is taken where it stands in the first row outside of quotes and some later row has as many cells; and in
    place of one that stands there too where every later row looked at has, and the extension's fits none.
    """
    usual = TABLES.get(kind_of(path), "\t")
    if usual == "\t" and placed:
        return usual  # cells without a header are texts, in which commas say nothing
    widths = {mark: _widths(path, mark) for mark in DELIMITERS}
    fits = {mark: sum(w == rows[0] for w in rows[1:]) for mark, rows in widths.items() if rows and rows[0] > 1}
    rest = max((len(rows) - 1 for rows in widths.values() if rows), default=0)
    if fits.get(usual):
        return usual
    others = [
        mark for mark in fits if mark != usual and (fits[mark] == rest if usual in fits else fits[mark] or not rest)
    ]
    return max(others, key=lambda mark: (fits[mark], widths[mark][0]), default=usual)


def delimiter_note(path: Path, placed: bool) -> str:
    """For the screen, where the cells of a table are parted by something else than its extension says."""
    found = delimiter_of(path, placed) if kind_of(path) in TABLES else None
    return f"; its cells are parted by {DELIMITERS[found]}" if found and found != TABLES[kind_of(path)] else ""


def header_hint(columns: Sequence[str]) -> str:
    """For an error: what a header of a single column looks like, where other marks than the rows' could part it."""
    marks = [words for mark, words in DELIMITERS.items() if len(columns) == 1 and mark in columns[0]]
    return f"; the header looks parted by {marks[0]}, but no row has as many cells: mend the rows" if marks else ""


def _widths(path: Path, delimiter: str) -> list[int]:
    """How many cells the first rows have if this parts them."""
    with opened(path) as stream:
        lines = (line for _, line in lines_of(stream, str(path)))
        widths = []
        with suppress(csv.Error):  # what could be read tells; the reader itself names the fault
            widths += (len(cells) for cells in islice(filter(None, csv.reader(lines, delimiter=delimiter)), LOOKED_AT))
        return widths


def _quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table with the line where each starts. Quotes are strict: a stray one would swallow later rows."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 KiB
    with opened(path) as stream:
        reader = csv.reader((line for _, line in lines_of(stream, str(path))), delimiter=delimiter, strict=True)
        start = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                letters = "; where quotes are letters, name columns by place: `columns: {text: column1}`"
                raise UserError(
                    f"{path}:{start}: broken {kind_of(path)[1:].upper()}: {error};"
                    ' a cell that starts with " must end with it, and quotes inside are doubled'
                    f"{letters if delimiter != ',' else ''}"
                ) from error
            if cells is None:
                return
            if cells:  # an empty line has none
                yield start, cells
            start = reader.line_num + 1


def _raw(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """A row a line, in which quotes are letters like others."""
    with opened(path) as stream:
        for number, line in lines_of(stream, str(path)):
            if line := line.rstrip("\r\n"):
                yield number, line.split(delimiter)
