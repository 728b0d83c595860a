"""Which files a path of the recipe stands for: itself, a pattern's, or a folder's."""

from __future__ import annotations

import difflib
import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple

from align.data.formats.shown import shown
from align.recipe.errors import UserError

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
ABOUT = re.compile(r"(licen[sc]e|readme|notice|requirements)\b", re.IGNORECASE)  # files that are not data


class Files(NamedTuple):
    """The files of one path, sorted, and what is to be said of others that were passed over."""

    paths: list[Path]
    remarks: list[str]


def data_files(path: str) -> list[Path]:
    """The files that a local path stands for; `survey` says which."""
    return survey(path).paths


def survey(path: str) -> Files:
    """A file itself; every data file below a folder; or what matches a pattern with `*`, `?`, `[…]` or `**`.

    Links to folders are followed, each folder once. Hidden files, unknown kinds and texts about the data (LICENSE.txt)
    are left out of folders and patterns. Raises UserError for a missing path, an unknown kind of file, a folder or a
    pattern without data, and what the system refuses to read.
    """
    try:
        return _survey(path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        place = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown(str(place), 200)}: cannot be read: {reason}") from None


def is_hub_id(path: str) -> bool:
    """Whether a path that is not here can only mean a data set on the hub: `name` or `owner/name`."""
    root = Path(path)
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) and kind_of(root) not in KINDS
    return bool(looks) and not os.path.lexists(root) and (root.parent == Path(".") or not os.path.exists(root.parent))


def kind_of(path: Path) -> str:
    """The extension that tells the reader: `.jsonl` for rows.jsonl and rows.jsonl.gz."""
    kind = path.suffix.lower()
    if kind == ".gz" and Path(path.stem).suffix.lower() != ".parquet":
        return Path(path.stem).suffix.lower() or kind
    return kind


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises UserError for what cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip: {error}; fetch or compress the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def near(missing: Path) -> str:
    """A did-you-mean for a path that is not there, or nothing."""
    try:
        siblings = [p.name for p in missing.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(missing.name, siblings, n=1)
    return f"; did you mean '{shown(str(missing.parent / close[0]))}'?" if close else ""


def _survey(path: str) -> Files:
    if not path.strip():
        raise UserError(f"{path!r}: an empty path; name a file, a folder or a pattern")
    root = Path(path)
    if root.is_dir():
        found = _below(root)
        if not found.paths:
            more = f" ({'; '.join(found.remarks)})" if found.remarks else ""
            raise UserError(f"{path}: the folder has no data file; expected some of {', '.join(KINDS)}{more}")
        return found
    if not root.exists():
        if root.is_symlink():
            raise UserError(f"{path}: this link leads to {os.readlink(root)}, which is not there; mend the link")
        if glob.has_magic(path):
            return _matching(path)
        raise UserError(f"{shown(path, 200)}: no such file or folder{near(root)}")
    if kind_of(root) not in KINDS and not _tabbed(root):
        found = f"unknown extension '{kind_of(root)}'" if kind_of(root) else "no extension"
        raise UserError(f"{path}: {found}; expected one of {', '.join(KINDS)} (also .gz, except Parquet)")
    if not root.is_file():
        raise UserError(f"{path}: neither a file nor a folder, but a device or a pipe; write its rows into a file")
    return Files([root], [])


def _below(root: Path) -> Files:
    """Every data file below a folder. Folders that are links come after all others, and each folder is read once."""
    paths, remarks, seen, links = [], [], set(), [root]
    while links:
        start = links.pop(0)
        real = os.path.realpath(start)
        loop = start is not root and _holds(real, start)
        if loop or real in seen:
            why = "it leads to a folder around it" if loop else "its folder is read already"
            remarks.append(f"{start}: a link that is not followed: {why}")
            continue
        found = []
        for folder, inside, names in os.walk(start, onerror=_raise):
            seen.add(os.path.realpath(folder))
            inside[:] = sorted(name for name in inside if not name.startswith(".") and _new(folder, name, seen))
            found += [Path(folder, name) for name in inside if os.path.islink(os.path.join(folder, name))]
            files = [Path(folder, name) for name in names if not name.startswith(".")]
            paths += [path for path in files if _is_data(path) and path.is_file()]
            gone = [path for path in files if path.is_symlink() and not path.exists()]
            remarks += [f"{path}: this link leads to {os.readlink(path)}, which is not there" for path in sorted(gone)]
        links += sorted(found)
    return Files(sorted(paths), remarks)


def _new(folder: str, name: str, seen: set[str]) -> bool:
    """Whether a folder is a link, which is looked at later, or is not read yet."""
    path = os.path.join(folder, name)
    return os.path.islink(path) or os.path.realpath(path) not in seen


def _holds(real: str, link: Path) -> bool:
    """Whether a link leads to a folder that it stands in."""
    return Path(os.path.realpath(link.parent)).is_relative_to(real)


def _matching(pattern: str) -> Files:
    """The data files that a pattern matches, and those below folders that it matches."""
    parts = Path(pattern).parts
    fixed = parts.index("**") if "**" in parts else len(parts)
    wanted = parts[fixed:]
    paths, remarks = set(), []
    for start in map(Path, sorted(glob.glob(str(Path(*parts[:fixed])) if fixed else "."))):
        found = _below(start) if start.is_dir() else Files([start] if _is_data(start) and not wanted else [], [])
        paths |= {path for path in found.paths if _matches(path.relative_to(start).parts, wanted)}
        remarks += found.remarks
    if not paths:
        raise UserError(
            f"{shown(pattern, 200)}: no data file matches this pattern; `*` stands for a part of one name, `**` for "
            f"any folders, and files end in {', '.join(KINDS)} (also .gz, except Parquet)"
        )
    return Files(sorted(paths), remarks)


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether a path, or a folder that it lies in, matches the pattern's parts."""
    if not wanted:
        return True
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or (bool(parts) and _matches(parts[1:], wanted))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _is_data(path: Path) -> bool:
    return kind_of(path) in KINDS and not ABOUT.match(path.name)


def _raise(error: OSError) -> None:
    raise error


def _tabbed(path: Path) -> bool:
    """Whether a file without extension begins with a line of cells that tabs part."""
    if path.suffix:
        return False
    with opened(path) as stream:
        return b"\t" in stream.readline(1 << 16)
