"""What a value of a row must be: a text, JSON, something that can be written; else it is refused with its place."""

from __future__ import annotations

import json
from typing import Any

from align.data.formats.rows import Refused
from align.data.formats.shown import a


def text(at: str, value: Any) -> str:
    """The value, which must be a text."""
    if not isinstance(value, str):
        raise Refused(f"{at}: expected text, found {a(value)}")
    return value


def filled(at: str, value: Any) -> str:
    """The value, which must be a text with more than white space."""
    if not text(at, value).strip():
        raise Refused(f"{at}: expected text, found {'only white space' if value else 'an empty text'}")
    return value


def from_json(at: str, value: Any) -> Any:
    """A nested value, which CSV cells and many columns hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{at}: expected JSON, found {a(value)} ({error})") from error


def encodable(at: str, value: Any) -> Any:
    """The value, which must survive being written as UTF-8 JSON: half surrogate pairs, dates, NaN do not."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise Refused(f"{at}: cannot be written as JSON in UTF-8: {error}") from error
    return value
