"""The texts of a row, and their words: what steps measure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from align.data.formats.rows import Row

# Scripts that write without blanks: Thai, Lao, Myanmar, Khmer, kana, Han. Hangul has blanks between words.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")


def whole(row: Row) -> str:
    """All that is said in a row, turn after turn and answer after answer, parted by blank lines."""
    return "\n\n".join(texts_of(row))


def texts_of(row: Row) -> Iterator[str]:
    """The text, or what each turn says and each answer; thoughts before what follows from them."""
    if row.text is not None:
        yield row.text
        return
    for message in (*row.messages, *row.answers):
        yield from _said(message)


def answers_of(row: Row) -> Iterator[str]:
    """What the assistant says: the text, where there are no turns."""
    if row.text is not None:
        yield row.text
        return
    for message in (*row.messages, *row.answers):
        if message["role"] == "assistant":
            yield from _said(message)


def words_of(text: str) -> list[str]:
    """Words in their order, as they are written: letters and digits. In scripts without blanks, single letters."""
    return WORD.findall(text)


def normal(text: str) -> list[str]:
    """The words by which texts are compared: case, punctuation, blanks and the form of Unicode do not count."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _said(message: dict[str, Any]) -> Iterator[str]:
    for key in ("reasoning_content", "content"):
        if message.get(key, "").strip():
            yield message[key]
    for call in message.get("tool_calls", ()):
        yield from _strings(call["function"]["arguments"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
