"""Images, videos and sounds, which no stage can learn: rows that refer to any are refused by name."""

from __future__ import annotations

from typing import Any

from align.data.rows import Refused
from align.data.shown import a, shown

KINDS = ("image", "video", "audio")
NAMES = {f"{kind}{end}" for kind in KINDS for end in ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files")}
REASON = "only text can be learnt, and this row refers to"


def text_alone(at: str, row: dict[str, Any]) -> None:
    """Refuse a row, or the turn at `at`, of which some column or key holds an image, a video or a sound."""
    for name in row.keys() & NAMES:
        if not _empty(row[name]):
            ways = "drop the row" if at else f"drop the row, or learn its text alone: `columns: {{{name}: null}}`"
            kind = next(kind for kind in KINDS if name.startswith(kind))
            raise Refused(f"{at}{name}: {REASON} {kind}s ({a(row[name])}); {ways}")


def part_of_text(at: str, kind: str) -> None:
    """Refuse a part of a turn's content whose type is an image, a video or a sound: `image_url`, `input_audio`, …"""
    found = next((word for word in KINDS if word in kind.lower()), None)
    if found:
        raise Refused(f"{at}: {REASON} {found}s (a part of type '{shown(kind, 40)}'); drop the row")


def _empty(value: Any) -> bool:
    """Whether a value names nothing, as the padding of a table does."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, list | tuple):
        return all(map(_empty, value))
    if isinstance(value, dict):
        return all(map(_empty, value.values()))
    if isinstance(value, int | float):
        return not value or value != value  # 0, False, or the NaN of a table
    return value is None or value == b""
