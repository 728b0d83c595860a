"""What a value of a row must be: a text, JSON, something that can be written; else it is refused with its place."""

from __future__ import annotations

import json
from typing import Any

from align.data.formats.rows import Refused, Row
from align.data.formats.shown import a

DEPTH = 100  # of lists and objects in a row
DEEP = f"expected a row nested at most {DEPTH} deep, found a deeper one"


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


def is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than DEPTH times: what reads rows walks them by recursion."""
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else ())
            if isinstance(inner, dict | list | tuple)
        ]
        if not level:
            return False
    return True


def shallow(row: Row) -> Row:
    """The row, whose tools and calls must not be nested too deeply for what writes them."""
    if any(map(is_deep, (row.messages, row.answers, row.tools))):
        raise Refused(DEEP)
    return row
