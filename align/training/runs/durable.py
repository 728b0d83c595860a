"""Files and folders that are whole or absent, whatever moment a kill or a full disk chooses."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from align.recipe.errors import UserError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` in one step: a kill leaves the old content or the new, never a part.

    Makes the folder where there is none. Half a surrogate pair, which UTF-8 lacks, is written as its escape. Raises
    UserError when the disk is full or refuses.
    """
    beside = path.with_name(f".writing-{path.name}")
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with speaking(path, len(raw)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(raw)
            sync(beside)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def published(folder: Path, size: int) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when it is whole and on the disk; a link there goes, and
    what it points to stays."""
    beside, old = (folder.with_name(f".{word}-{folder.name}") for word in ("writing", "old"))
    with speaking(folder, size):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            for file in (*beside.iterdir(), beside):
                sync(file)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)  # until the next line there is none, and a run that is killed here writes it anew
        beside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def speaking(path: Path, size: int) -> Iterator[None]:
    """Say what the disk refused, when `size` bytes were to be written at `path`, in words that help."""
    try:
        yield
    except Exception as error:
        if (reason := _refused(error)) is None:
            raise
        near = next((folder for folder in path.parents if folder.is_dir()), Path("/"))
        free = shutil.disk_usage(near).free
        room = f"{size / 1e6:,.1f} MB to write, {free / 1e6:,.1f} MB free in {near}"
        raise UserError(
            f"{path}: cannot be written: {reason} ({room}); make room there or choose another folder. "
            "What was saved before is still whole."
        ) from error


def _refused(error: Exception) -> str | None:
    """What the system said, where it refused a file; None for another error. Libraries in Rust wrap it in their own:
    safetensors in SafetensorError, tokenizers in a bare Exception."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"([^:]*) \(os error \d+\)", str(error))
    return found[1].strip() if found else str(error) if isinstance(error, SafetensorError) else None
