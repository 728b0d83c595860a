"""JSON as align writes and reads it: one writer without NaN, and one reader of JSON lines that works on bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from align.recipe.errors import UserError

Record = dict[str, Any]


def to_json(value: Any, **options: Any) -> str:
    """`value` as JSON (RFC 8259), with null for every NaN and Infinity, and text outside ASCII as it is.

    `options` are those of `json.dumps`. Half a surrogate pair is written as its escape, so the text can always be
    encoded as UTF-8. Lines that other readers split at (U+2028, U+2029, U+0085) stay inside their string:
    read them back with `read_lines`.
    """
    text = json.dumps(_finite(value), allow_nan=False, **{"ensure_ascii": False} | options)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def read_lines(
    path: Path,
    shape: Mapping[str, type] | None = None,
    *,
    say: Callable[[str], object] = lambda line: None,
    remedy: str = "mend it, or move the file away",
) -> list[Record]:
    """The objects of a JSON lines file; none where there is no file.

    Lines end with a newline and nothing else. A last line that a kill has torn is dropped, and `say` is told so.
    `shape`: keys that every object must have -> their types. Raises UserError for every other line that is no
    such object, by file and number, with the `remedy`.
    """
    found, faults = [], []
    numbered = [*each_line(path)]
    for number, record in numbered:
        wrong = record and next((key for key, kind in (shape or {}).items() if not _is(record.get(key), kind)), None)
        if record is None and number == numbered[-1][0]:
            say(f"{path}:{number}: the last line is torn; it is left out")
        elif record is None:
            faults.append(f"{path}:{number}: not a JSON object; {remedy}")
        elif wrong:
            faults.append(f"{path}:{number}: it has no {wrong!r} of type {shape[wrong].__name__}; {remedy}")
        else:
            found.append(record)
    if faults:
        raise UserError(*faults[:3], *([f"{path}: and {len(faults) - 3} more such lines"] if len(faults) > 3 else []))
    return found


def is_there(path: Path) -> bool:
    """Whether a file stands there. Raises UserError for a folder, a named pipe or a device in its place: to read one of
    these fails, or never ends."""
    if path.is_file():
        return True
    if path.exists():
        what = "a folder" if path.is_dir() else "a named pipe" if path.is_fifo() else "a device or a socket"
        raise UserError(f"{path}: {what} stands where a file is to be; move it away")
    return False


def each_line(path: Path) -> Iterator[tuple[int, Record | None]]:
    """Number, from 1, and object of every line of a JSON lines file; None for a line that is no JSON object.

    Empty lines are passed over. Nothing where there is no file. Raises UserError as `is_there` does.
    """
    if not is_there(path):
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, parsed(line)


def parsed(raw: bytes | str) -> Record | None:
    """The JSON object that these bytes are, or None. NaN and Infinity, which others may write, are read as such."""
    try:
        value = json.loads(raw.decode("utf-8") if isinstance(raw, bytes) else raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind if kind is int else isinstance(value, kind)  # True is no number


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
