"""What the workers found, on disk, batch after batch, so that a run that was killed goes on where it was.

Each column is a file that grows; a line of the journal names the end of every one after a batch. What lies beyond the
journal's last whole line, of a batch that was cut off, is cut away when the spool is opened again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from align.recipe.records import parsed, to_json

JOURNAL, ROWS, STARTS = "journal.jsonl", "rows.jsonl", "rows.starts"
COUNTS = "/counts"  # ends the name of a column that holds how many values of a ragged one each row has


class Spool:
    """Columns of n rows, the rows themselves, and a record a batch."""

    def __init__(self, folder: Path) -> None:
        """Opened where it was left off; empty where it is new."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.batches, self.kinds, self.ends = list[dict[str, Any]](), dict[str, list[Any]](), dict[str, int]()
        journal, whole = folder / JOURNAL, 0
        for line in journal.read_bytes().split(b"\n")[:-1] if journal.exists() else ():
            record = parsed(line)
            if record is None:
                break
            self.batches.append(record["about"])
            self.kinds, self.ends, whole = record["kinds"], record["ends"], whole + len(line) + 1
        _cut(journal, whole)
        for name, end in self.ends.items():
            _cut(self._file(name), end)
        self.journal = journal.open("ab")
        self.files = {name: self._file(name).open("ab") for name in self.ends}

    def __len__(self) -> int:
        """Rows."""
        return self.ends.get(STARTS, 0) // 8

    def add(self, about: Mapping[str, Any], columns: Mapping[str, np.ndarray], blobs: Mapping[str, bytes]) -> None:
        """A batch: columns (k, …) each, blobs that are put to the end of files of their names, and what to note."""
        for name, array in columns.items():
            self.kinds.setdefault(name, [array.dtype.str, list(array.shape[1:])])
            assert self.kinds[name] == [array.dtype.str, list(array.shape[1:])], f"{name}: {array.dtype} {array.shape}"
            self._append(name, np.ascontiguousarray(array).tobytes())
        for name, blob in blobs.items():
            self._append(name, blob)
        for file in self.files.values():
            file.flush()
        line = to_json({"about": about, "kinds": self.kinds, "ends": self.ends}).encode()
        self.journal.write(line + b"\n")
        self.journal.flush()
        self.batches.append(parsed(line)["about"])  # as it is read when a run goes on

    def add_rows(
        self, about: Mapping[str, Any], rows: list[bytes], columns: Mapping[str, np.ndarray], **blobs: bytes
    ) -> None:
        """The same with a batch's rows."""
        at = self.ends.get(ROWS, 0)
        starts = at + np.cumsum([0, *map(len, rows)])[:-1]
        self.add(about, columns | {STARTS: starts.astype(np.int64)}, blobs | {ROWS: b"".join(rows)})

    def column(self, name: str) -> np.ndarray:
        """All rows of a column, memory-mapped."""
        dtype, shape = self.kinds.get(name, ["<i8", []])
        count = self.ends.get(name, 0) // (np.dtype(dtype).itemsize * int(np.prod(shape)))
        if not count:
            return np.zeros((0, *shape), dtype)
        return np.memmap(self._file(name), dtype, mode="r", shape=(count, *shape))

    def rows(self, places: np.ndarray) -> Iterator[bytes]:
        """The rows at these places, ascending."""
        starts = np.append(self.column(STARTS), self.ends.get(ROWS, 0))
        with self._file(ROWS).open("rb") as file:
            for place in places:
                file.seek(starts[place])
                yield file.read(starts[place + 1] - starts[place])

    def blob(self, name: str) -> bytes:
        """What was put into a file."""
        return self._file(name).read_bytes() if name in self.ends else b""

    def close(self) -> None:
        """Let go of the files."""
        for file in (self.journal, *self.files.values()):
            file.close()

    def _append(self, name: str, data: bytes) -> None:
        if name not in self.files:
            _cut(self._file(name), 0)
            self.files[name] = self._file(name).open("ab")
        self.files[name].write(data)
        self.ends[name] = self.ends.get(name, 0) + len(data)

    def _file(self, name: str) -> Path:
        return self.folder / name.replace("/", "_")


class Part:
    """What one set step sees of a spool; see `step.Sketches`."""

    def __init__(self, spool: Spool, step: str, rows: Spool) -> None:
        """`rows`: the spool of the rows themselves, where the step's sketches are in another."""
        self.spool, self.step = spool, step
        self.number, self.source = rows.column("number"), rows.column("source")

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.spool.column(f"{self.step}:{name}")

    def ragged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """See `step.Sketches`."""
        return self[name], np.concatenate([[0], np.cumsum(self[name + COUNTS])])


def _cut(path: Path, end: int) -> None:
    """Make the file this long."""
    with path.open("ab") as file:
        file.truncate(end)
