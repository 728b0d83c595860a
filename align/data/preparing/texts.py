"""The texts of a row: what steps measure, and what they may change."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from align.data.formats.rows import Row
from align.data.preparing.step import Item

SPELT = ("content", "reasoning_content")  # of a message: what somebody wrote
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


def rewritten(item: Item, write: Callable[[str], str]) -> Item:
    """The item with every text in it as `write` gives it: turns, thoughts, calls and their arguments, answers, tools
    and the columns of its record. Labels, roles, names of functions and keys stay."""
    row = item.row
    messages = None if row.messages is None else [_message(message, write) for message in row.messages]
    text = None if row.text is None else write(row.text)
    answers = tuple(_message(message, write) for message in row.answers)
    tools = None if row.tools is None else [_rewritten(tool, write, ("type", "name")) for tool in row.tools]
    changed = row._replace(messages=messages, text=text, answers=answers, tools=tools)
    return item._replace(row=changed, record=_rewritten(item.record, write))


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


def _message(message: dict[str, Any], write: Callable[[str], str]) -> dict[str, Any]:
    spelt = {key: write(message[key]) for key in SPELT if key in message}
    calls = [
        call | {"function": call["function"] | {"arguments": _rewritten(call["function"]["arguments"], write)}}
        for call in message.get("tool_calls", ())
    ]
    return message | spelt | ({"tool_calls": calls} if calls else {})


def _rewritten(value: Any, write: Callable[[str], str], kept: tuple[str, ...] = ()) -> Any:
    """A value with every text in it rewritten, but for those under the `kept` keys."""
    if isinstance(value, str):
        return write(value)
    if isinstance(value, dict):
        return {
            key: inner if key in kept and isinstance(inner, str) else _rewritten(inner, write, kept)
            for key, inner in value.items()
        }
    return [_rewritten(inner, write, kept) for inner in value] if isinstance(value, list | tuple) else value
