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


def opened(path: Path, key: str) -> int:
    """The file's handle; it is made where there is none. Raises UserError, `key` first, where it cannot be written."""
    if path.exists() and not path.is_file():
        raise UserError(f"{key}: {path} is no file; name another")
    try:
        return os.open(path, FLAGS, 0o644)
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; name another file") from error


def append(path: Path, records: Sequence[Any], key: str) -> None:
    """A line for each record, at the end of the file. Several processes may do so at once. Raises UserError."""
    handle = opened(path, key)
    try:
        with locked(handle):
            extend(handle, path, records)
    finally:
        os.close(handle)


def extend(handle: int, path: Path, records: Sequence[Any]) -> None:
    """The same with a handle of `opened`, which nobody else writes to meanwhile.

    A last line that has no line break gets one. Raises UserError, from the OSError, where there is no room: the file
    then is as it was.
    """
    lines = "".join(to_json(record) + "\n" for record in records).encode()
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        lines = b"\n" + lines
    try:
        while lines:
            lines = lines[os.write(handle, lines) :]
        os.fsync(handle)
    except BaseException as error:
        os.ftruncate(handle, size)
        if isinstance(error, OSError):
            raise UserError(f"{path}: {error.strerror}; nothing was added to it: make room there") from error
        raise
