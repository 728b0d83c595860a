"""Reading files: every kind becomes a stream of numbered records, in memory that does not grow with the file.

A record is `(line, value)`: the 1-based line where it starts (in Parquet and hub sets the row's number) and
what was read: a dict for a good row, `Broken` where the syntax fails on that line alone, or whatever else
JSON holds. What no later line can mend (broken gzip, UTF-8, CSV, JSON array) is a `UserError` with its line.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from align.data.lines import Broken, Record, json_array, json_lines, lines_of
from align.recipe.errors import UserError
from align.recipe.schema import Source

TABLES = {".csv": ",", ".tsv": "\t"}
PLACE = re.compile(r"column[1-9]\d*")  # a column named by its place
ABOUT = re.compile(r"(licen[sc]e|readme|notice|requirements)\b", re.IGNORECASE)  # files that are not data


def data_files(path: str) -> list[Path]:
    """The files that a local path stands for: itself, or every data file below a folder, sorted.

    Hidden files, unknown kinds and texts about the data (LICENSE.txt) are left out of a folder. Raises
    UserError for a missing path, an unknown kind of file and a folder without data.
    """
    root = Path(path)
    if root.is_dir():
        inside = sorted(p for p in root.rglob("*") if p.is_file())
        shown = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        files = [p for p in shown if _kind(p) in READERS and not ABOUT.match(p.name)]
        if not files:
            raise UserError(f"{path}: the folder has no data file; expected some of {', '.join(READERS)}")
        return files
    if not root.exists():
        raise UserError(f"{path}: no such file or folder{_near(root)}")
    if _kind(root) not in READERS and not _tabbed(root):
        found = f"unknown extension '{_kind(root)}'" if _kind(root) else "no extension"
        raise UserError(f"{path}: {found}; expected one of {', '.join(READERS)} (also .gz, except Parquet)")
    return [root]


def is_hub_id(path: str) -> bool:
    """Whether a path that is not here can only mean a data set on the hub: `name` or `owner/name`."""
    root = Path(path)
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) and _kind(root) not in READERS
    return bool(looks) and not root.exists() and (root.parent == Path(".") or not root.parent.exists())


def read_file(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Records of one local file, by its extension; `columns` are the format's names and the file's for them.

    Where all of these are places, `column1`, `column2`, …, a table needs no header; in TSV, quotes are then letters.
    """
    kind = _kind(path) or ".tsv"
    return _table(path, TABLES[kind], columns or {}) if kind in TABLES else READERS[kind](path)


def read_hub(source: Source) -> Iterator[Record]:
    """Rows of a hub data set, streamed. Raises UserError for whatever fails there."""
    import datasets  # slow to import, and only this needs it

    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split, streaming=True)
        yield from enumerate(rows, 1)
    except Exception as error:  # the hub client raises dozens of kinds
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source.path}: no such file or folder{_near(Path(source.path))}; and as a hub data set it"
            f" cannot be read (that needs network access and the right `name` and `split`): {cause}"
        ) from error


def _json(path: Path) -> Iterator[Record]:
    """An array of rows, or one row a line: the first character tells, whatever the name."""
    with _opened(path) as stream:
        array = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    with _opened(path) as stream:
        yield from (json_array if array else json_lines)(stream, str(path))


def _table(path: Path, delimiter: str, columns: Mapping[str, str]) -> Iterator[Record]:
    """Cells under the first row's names, or under their places."""
    placed = bool(columns) and all(PLACE.fullmatch(column) for column in columns.values())
    header: list[str] = []
    for start, cells in (_raw if placed and delimiter == "\t" else _quoted)(path, delimiter):
        if not header:
            header = names = [cell.strip() for cell in cells]
            if placed:
                header = [f"column{i}" for i in range(1, len(cells) + 1)]
                there = dict(zip(header, names, strict=True))
            if not placed or all(there.get(column) in (name, column) for name, column in columns.items()):
                if len(set(header)) < len(header):
                    raise UserError(f"{path}:{start}: a column stands twice in the header: {', '.join(header)}")
                continue  # it was a header
        if len(cells) == len(header):
            yield start, dict(zip(header, cells, strict=True))
        else:
            where = "first row" if placed else "header"
            yield start, Broken(f"expected {len(header)} cells as in the {where}, found {len(cells)}")


def _quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table with the line where each starts. Quotes are strict: a stray one would swallow later rows."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 KiB
    with _opened(path) as stream:
        reader = csv.reader((line for _, line in lines_of(stream, str(path))), delimiter=delimiter, strict=True)
        start = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                letters = "; where quotes are letters, name columns by place: `columns: {text: column1}`"
                raise UserError(
                    f"{path}:{start}: broken {_kind(path)[1:].upper()}: {error};"
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
    with _opened(path) as stream:
        for number, line in lines_of(stream, str(path)):
            if line := line.rstrip("\r\n"):
                yield number, line.split(delimiter)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=256)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def has_blank_lines(path: Path) -> bool:
    """Whether blank lines part the documents of a text file; where none does, every line is one."""
    with _opened(path) as stream:
        spoken = blank = False
        for _, line in lines_of(stream, str(path)):
            if line.strip() and blank:
                return True
            spoken = spoken or bool(line.strip())
            blank = spoken and not line.strip()
    return False


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, with their ends."""
    with _opened(path) as stream:
        yield from lines_of(stream, str(path))


def _text(path: Path) -> Iterator[Record]:
    """Documents of a text file, parted by blank lines; in a file without any, every line is a document."""
    parted = has_blank_lines(path)
    with _opened(path) as stream:
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
    **{kind: partial(_table, delimiter=delimiter, columns={}) for kind, delimiter in TABLES.items()},
    ".parquet": _parquet,
    ".txt": _text,
}


def _kind(path: Path) -> str:
    """The extension that tells the reader: `.jsonl` for rows.jsonl and rows.jsonl.gz."""
    kind = path.suffix.lower()
    if kind == ".gz" and Path(path.stem).suffix.lower() != ".parquet":
        return Path(path.stem).suffix.lower() or kind
    return kind


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip: {error}; fetch or compress the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _tabbed(path: Path) -> bool:
    """Whether a file without extension begins with a line of cells that tabs part."""
    if path.suffix:
        return False
    with _opened(path) as stream:
        return b"\t" in stream.readline(1 << 16)


def _near(missing: Path) -> str:
    siblings = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = difflib.get_close_matches(missing.name, siblings, n=1)
    return f"; did you mean '{missing.parent / close[0]}'?" if close else ""
