"""Reading files: every kind becomes a stream of numbered records, in memory that does not grow with the file.

A record is `(line, value)`: the 1-based line where it starts (in Parquet and hub sets the row's number) and
what was read: a dict for a good row, `Broken` where the syntax fails on that line alone, or whatever else
JSON holds. What no later line can mend (broken gzip, UTF-8, CSV, JSON array) is a `UserError` with its line.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from align.data.files.arrow import parquet, unpadded
from align.data.files.lines import Record, json_array, json_lines, lines_of
from align.data.files.paths import kind_of, near, opened
from align.data.files.tables import TABLES, table
from align.recipe.errors import UserError
from align.recipe.schema import Source


def read_file(path: Path, columns: Mapping[str, str | None] | None = None) -> Iterator[Record]:
    """Records of one local file, by its extension; `columns` are the format's names and the file's for them.

    Where all of these are places, `column1`, `column2`, …, a table needs no header; in TSV, quotes are then letters.
    """
    kind = kind_of(path) or ".tsv"
    return table(path, columns or {}) if kind in TABLES else READERS[kind](path)


def read_hub(source: Source) -> Iterator[Record]:
    """Rows of a hub data set, streamed. Raises UserError for whatever fails there."""
    import datasets  # slow to import, and only this needs it

    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split, streaming=True)
        clean = unpadded(rows.features.arrow_schema if rows.features else None)
        yield from enumerate(map(clean, rows), 1)
    except Exception as error:  # the hub client raises dozens of kinds
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source.path}: no such file or folder{near(Path(source.path))}; and as a hub data set it"
            f" cannot be read (that needs network access and the right `name` and `split`): {cause}"
        ) from error


def _json(path: Path) -> Iterator[Record]:
    """An array of rows, or one row a line: the first character tells, whatever the name."""
    with opened(path) as stream:
        array = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    with opened(path) as stream:
        yield from (json_array if array else json_lines)(stream, str(path))


def has_blank_lines(path: Path) -> bool:
    """Whether blank lines part the documents of a text file; where none does, every line is one."""
    with opened(path) as stream:
        spoken = blank = False
        for _, line in lines_of(stream, str(path)):
            if line.strip() and blank:
                return True
            spoken = spoken or bool(line.strip())
            blank = spoken and not line.strip()
    return False


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, with their ends."""
    with opened(path) as stream:
        yield from lines_of(stream, str(path))


def _text(path: Path) -> Iterator[Record]:
    """Documents of a text file, parted by blank lines; in a file without any, every line is a document."""
    parted = has_blank_lines(path)
    with opened(path) as stream:
        start, document = 0, []
        for number, line in lines_of(stream, str(path)):
            if line.strip():
                start = start if document else number
                document.append(line.rstrip())
            if document and not (line.strip() and parted):
                yield start, {"text": "\n".join(document)}
                document = []
        if document:
            yield start, {"text": "\n".join(document)}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".parquet": parquet,
    ".txt": _text,
}
