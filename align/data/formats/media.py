"""Images, videos and sounds, which no stage can learn: rows that refer to any are refused by name."""

from __future__ import annotations

import re
from typing import Any

from align.data.formats.rows import Refused
from align.data.formats.shown import a, in_yaml, shown

KINDS = ("image", "video", "audio")
ENDS = ("path", "url", "file", "byte", "base64")
NAMES = {f"{kind}{end}{s}": kind for kind in KINDS for end in ("", *ENDS) for s in ("", "s")}
NAMES |= dict.fromkeys(("img", "imgs", "picture", "pictures", "photo", "photos", "pixelvalues"), "image")
NAMES |= dict.fromkeys(("clip", "clips", "videoframes"), "video") | dict.fromkeys(("sound", "sounds", "wav"), "audio")
NAMES |= dict.fromkeys(("media", "mmdata", "multimodal", "multimodaldata", "attachments"), "media file")
FILE = {"bytes", "path"}  # the keys of an image, a sound or a video in a hub data set, whatever its column is called
REASON = "only text can be learnt, and this row refers to"


def text_alone(at: str, row: dict[str, Any]) -> None:
    """Refuse a row, or the turn at `at`, of which some column or key holds an image, a video or a sound."""
    for name, value in row.items():
        kind = NAMES.get(re.sub(r"[\W_]", "", str(name).lower())) or ("file" if _is_file(value) else None)
        if kind and not _empty(value):
            ways = (
                "drop the row" if at else f"drop the row, or learn its text alone: `columns: {{{in_yaml(name)}: null}}`"
            )
            raise Refused(f"{at}{shown(name)}: {REASON} {kind}s ({a(value)}); {ways}")


def part_of_text(at: str, kind: str) -> None:
    """Refuse a part of a turn's content whose type is an image, a video or a sound: `image_url`, `input_audio`, …"""
    found = next((word for word in KINDS if word in kind.lower()), None)
    if found:
        raise Refused(f"{at}: {REASON} {found}s (a part of type '{shown(kind, 40)}'); drop the row")


def _is_file(value: Any) -> bool:
    """Whether it is a file of a hub data set, or a list of some."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_file, value))
    if not isinstance(value, dict) or not value.keys() <= FILE:
        return False
    return value.keys() == FILE or isinstance(value.get("bytes"), bytes)  # Parquet's nulls may be gone


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
