"""Locks between processes, which the system takes back when their process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align.recipe.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none


@contextmanager
def claimed(folder: Path, what: str = "another process is writing to") -> Iterator[None]:
    """Hold a folder, made where there is none, against all other processes; on leaving, it goes again if it is empty.

    To be taken before anything in the folder is read. Raises UserError, with `what` is going on there, at once where
    another process holds it, and for a path that can be no folder.
    """
    made, handle = [], None
    try:
        while handle is None:
            made = _make(folder) or made
            handle = _locked(folder, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run: {what} {folder}; wait for it, or stop it") from None
    except (NotADirectoryError, FileExistsError):
        file = next((path for path in (folder, *folder.parents) if path.exists() or path.is_symlink()), folder)
        kind = "is a file" if file.exists() else "is a link to nothing"
        what = kind if file == folder else f"lies in {file}, which {kind}"
        raise UserError(f"run: {folder} {what}; name another folder") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"run: {str(folder)!r} cannot be a folder to write to ({reason}); name another one") from None
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        os.close(handle)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Wait until no other process is in here for this lock file, then keep all others out; the file goes afterwards."""
    handle = None
    while handle is None:
        handle = _locked(file, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # whoever waits for it sees that it has gone, and makes another
        os.close(handle)


@contextmanager
def locked(handle: int, wait: bool = True) -> Iterator[None]:
    """Keep all others out of an open file. Where one holds it, wait; without `wait`, raise BlockingIOError."""
    with _where_there_are_locks():
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        with _where_there_are_locks():
            fcntl.flock(handle, fcntl.LOCK_UN)


def _locked(path: Path, flags: int, how: int) -> int | None:
    """A handle that holds the lock on what stands at `path`; None where that has gone meanwhile."""
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        if path.parent.is_dir():
            return None
        raise
    try:
        with _where_there_are_locks():
            fcntl.flock(handle, how)
        now, held = path.stat(), os.fstat(handle)
        if (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino):
            return handle
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextmanager
def _where_there_are_locks() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _make(folder: Path) -> list[Path]:
    """Make a folder and those around it; those that were made, the innermost first."""
    if folder.is_dir():
        return []
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return absent
