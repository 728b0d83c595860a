"""Items for tests of steps."""

from __future__ import annotations

from typing import Any

from align.data.formats.rows import Row
from align.data.preparing.reading import kind_of
from align.data.preparing.step import Item


def item(row: Row, number: int = 0, source: int = 0, **record: Any) -> Item:
    return Item(number, source, kind_of(row), row._replace(file="rows.jsonl", line=number + 1), record)


def text(words: str, number: int = 0, **record: Any) -> Item:
    return item(Row("", 0, None, words, None), number, **record)


def labelled_text(words: str, label: str, number: int = 0) -> Item:
    return item(Row("", 0, None, words, None, label=label), number)


def talk(*turns: str, number: int = 0, **record: Any) -> Item:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(turns)]
    return item(Row("", 0, messages, None, None), number, **record)


def pair(prompt: str, best: str, worst: str, number: int = 0, margin: float | None = None) -> Item:
    answers = tuple({"role": "assistant", "content": said} for said in (best, worst))
    targets = () if margin is None else (margin, 0.0)
    return item(Row("", 0, [{"role": "user", "content": prompt}], None, None, (), answers, targets), number)
