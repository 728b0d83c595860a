"""Rules of the recipe's own: lengths, languages, signs, placeholders, refusals, words, and functions."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.data.files.files import text_lines
from align.data.formats.shown import a
from align.data.preparing.filters.ratios import digits, symbols
from align.data.preparing.languages import language
from align.data.preparing.step import Item, Verdict, drop, keep
from align.data.preparing.texts import UNSPACED, answers_of, texts_of, whole, words_of
from align.recipe.errors import UserError
from align.recipe.functions import Border, imported
from align.recipe.preparing.filters import Filter, Words

PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}"  # {{name}}, as Jinja, Mustache and LLaMA-Factory's identity.json write it
    r"|\[\s*(?:insert|your|enter|add)\b[^\[\]\n]{0,40}\]"  # [Your Name]
    r"|<\s*(?:insert|your)\b[^<>\n]{0,40}>",
    re.IGNORECASE,
)
SORRY = r"(?:i['’]?m|i am)\s+(?:(?:very|so|really|truly)\s+)?sorry|i apologi[sz]e|sorry"
CANNOT = r"(?:cannot|can['’]?t|can not|am not able to|['’]m not able to|am unable to|['’]m unable to|won['’]t|will not)"
MACHINE = (
    r"(?:(?:ai|artificial intelligence)(?:[- ](?:language )?(?:model|assistant|chatbot|system))?"
    r"|(?:large )?language model)"
)
HELP = r"(?:help|assist|provide|fulfil|fulfill|comply|answer|create|generate|support|engage|do that|discuss|continue)"
REFUSAL = re.compile(
    rf"^\W*(?:(?:{SORRY})\W+(?:but\s+)?(?:as an? [^.\n]{{1,60}}[,.]\s*)?i\s?{CANNOT}"
    rf"|i\s?{CANNOT}\s+{HELP}\b"
    rf"|(?:[^.!?\n]{{0,80}}\W)?as an? {MACHINE}(?:\s*,|\s+(?:i|my)\b)"
    r"|(?:很|非常)?(?:抱歉|对不起)[，,\s]*(?:但)?(?:我|作为)[^。\n]{0,20}(?:无法|不能|没有办法)"
    r"|作为(?:一个|一名|一款)?\s?(?:ai|人工智能|语言模型|大型语言模型|虚拟助手))",
    re.IGNORECASE,
)
PLACEHOLDER_SHOWN = 60


class Rule:
    """A row step of one question: why does this row go? None where it stays."""

    name: str

    def why(self, item: Item) -> tuple[str, str] | None:
        """The reason, and an example or a number for the report."""
        raise NotImplementedError

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [drop(*why) if (why := self.why(item)) else keep(item) for item in items]


class Length(Rule):
    """Characters, words and turns."""

    name = "filter.length"

    def __init__(self, section: Filter) -> None:
        self.section = section

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        section, row = self.section, item.row
        characters = sum(map(len, texts_of(row)))
        for reason, value, least, most in (
            ("characters", characters, section.min_characters, section.max_characters),
            ("words", self._words(row), section.min_words, section.max_words),
            ("turns", len(row.messages or ()), None, section.max_turns),
        ):
            if least is not None and value < least:
                return f"fewer than {least:,} {reason}", f"{value:,}"
            if most is not None and value > most:
                return f"more than {most:,} {reason}", f"{value:,}"
        return None

    def _words(self, row: Any) -> int:
        asked = self.section.min_words or self.section.max_words
        return sum(len(words_of(text)) for text in texts_of(row)) if asked else 0


class Signs(Rule):
    """Symbols and digits."""

    name = "filter.signs"

    def __init__(self, section: Filter) -> None:
        self.section = section

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        text = whole(item.row)
        for reason, measure, most in (
            ("too many symbols", symbols, self.section.max_symbols),
            ("too many digits", digits, self.section.max_digits),
        ):
            if most is not None and (value := measure(text)) > most:
                return reason, f"{value:.4g}"
        return None


class Languages(Rule):
    """The language that a row is taken to be in."""

    name = "filter.languages"

    def __init__(self, wanted: Sequence[str], least: float) -> None:
        self.wanted, self.least = frozenset(wanted), least

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        found = language(whole(item.row))
        if found.code not in self.wanted:
            return "another language", found.code
        return ("no language surely enough", f"{found.code} {found.share:.2f}") if found.share < self.least else None


class Placeholders(Rule):
    """Placeholders of a template that nobody filled in."""

    name = "filter.placeholders"

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        found = PLACEHOLDER.search(whole(item.row))
        return ("a placeholder of a template", found[0][:PLACEHOLDER_SHOWN]) if found else None


class Refusals(Rule):
    """An assistant that refuses, or speaks of itself as a language model, at the beginning of a turn.

    Of rows with answers, only the best one counts: a rejected answer may well refuse.
    """

    name = "filter.refusals"

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        row = item.row
        if item.kind == "labelled" and row.targets == (0.0,):
            return None
        said = answers_of(row._replace(answers=row.answers[:1]))
        found = next(filter(None, (REFUSAL.match(text) for text in said)), None)
        return ("the assistant refuses", "") if found else None


class WordList(Rule):
    """Words that rows may not hold."""

    def __init__(self, section: Words, key: str) -> None:
        self.name, self.most, self.title = key, section.max, section.name
        words = [*section.words, *(_listed(section.file, key) if section.file else ())]
        words = sorted({" ".join(word.split()).casefold() for word in words if word.strip()})
        if not words:
            raise UserError(f"{key}.file: {section.file} holds no words")
        self.pattern = re.compile("|".join(map(_bounded, words)))

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        count = 0
        for text in texts_of(item.row):
            count += sum(1 for _ in self.pattern.finditer(" ".join(text.split()).casefold()))
        return (f"words of the list {self.title!r}", f"{count:,}") if count > self.most else None


class Function(Rule):
    """A function of the user's own."""

    def __init__(self, name: str, key: str, border: Border) -> None:
        self.name, self.called, self.border = key, name, border
        self.function = imported(name, key, border)

    def why(self, item: Item) -> tuple[str, str] | None:
        """See `Rule`."""
        row = item.row
        given = {
            "messages": row.messages,
            "text": row.text,
            "answers": list(row.answers),
            "label": row.label,
            "record": item.record,
        }
        told = f"{row.file}:{row.line}: the function {self.called} failed"
        said = self.border(told, lambda: self.function(copy.deepcopy(given)))  # its own, which it may change
        if isinstance(said, str) and said:
            return said[:200], ""
        if not isinstance(said, bool | np.bool_):
            raise UserError(
                f"{row.file}:{row.line}: the function {self.called} returned {a(said)}; expected true to keep the row, "
                "or false or a text, why it goes"
            )
        return None if said else (f"{self.called} said no", "")


def _listed(file: str, key: str) -> Iterable[str]:
    if not Path(file).is_file():
        raise UserError(f"{key}.file: {file}: no such file")
    return [line for _, line in text_lines(Path(file))]


def _bounded(word: str) -> str:
    """The word as a pattern that does not find it inside another, except in scripts that write without blanks."""
    first = "" if re.match(rf"[{UNSPACED}]|\W", word[0]) else r"(?<!\w)"
    last = "" if re.match(rf"[{UNSPACED}]|\W", word[-1]) else r"(?!\w)"
    return f"{first}{re.escape(word)}{last}"
