"""JSON lines files that grow: what is appended is whole and on the disk, or not there at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.recipe.errors import UserError
from align.recipe.locks import locked
from align.recipe.records import to_json

FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


def begin(path: Path, key: str) -> None:
    """Make the file where there is none. Raises UserError, `key` first, where none can be written to there."""
    if path.exists() and not path.is_file():
        raise UserError(f"{key}: {path} is no file; name another")
    try:
        os.close(os.open(path, FLAGS, 0o644))
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; name another file") from error


def append(path: Path, records: Sequence[Any]) -> None:
    """A line for each record, at the end of the file, after a line break where the last one has none.

    Several processes may do so at once. Raises UserError, from the OSError, where there is no room: the file then is
    as it was.
    """
    lines = "".join(to_json(record) + "\n" for record in records).encode()
    try:
        handle = os.open(path, FLAGS, 0o644)
        try:
            with locked(handle):
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    lines = b"\n" + lines
                try:
                    _write(handle, lines)
                except BaseException:
                    os.ftruncate(handle, size)
                    raise
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was added to it: make room there") from error


def _write(handle: int, lines: bytes) -> None:
    while lines:
        lines = lines[os.write(handle, lines) :]
    os.fsync(handle)
