"""The rules of Gopher, C4 and FineWeb, with the sections that hold their thresholds.

Checked against datatrove's `gopher_quality_filter.py`, `gopher_repetition_filter.py`, `c4_filters.py` and
`fineweb_quality_filter.py`. Words are what blanks part; datatrove's tokenizer parts off punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from align.data.preparing.filters.ratios import (
    BULLETS,
    ELLIPSES,
    paragraphs,
    repeated,
    repeated_ngrams,
    sentences,
    share,
    top_ngram,
)
from align.data.preparing.step import Item, Verdict, change, drop, keep
from align.data.preparing.texts import UNSPACED, whole
from align.recipe.preparing.filters import C4, FineWeb, GopherQuality, GopherRepetition

MOST_WORDS = 100_000  # of a text, whose repetition is measured
ENDS = (".", "?", "!", '"', "'", "。", "？", "！", "”", "’")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
SPLIT = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # at blanks, and around letters of scripts without any


class GopherQualityRules:
    """Gopher's rules of quality."""

    name = "filter.gopher_quality"

    def __init__(self, rules: GopherQuality) -> None:
        self.rules, self.stop = rules, frozenset(map(str.casefold, rules.stop_words))

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [_first(self._faults(whole(item.row)), item) for item in items]

    def _faults(self, text: str) -> Iterator[tuple[str, float] | None]:
        rules, words, lines = self.rules, SPLIT.findall(text), text.splitlines()
        real = [word for word in words if any(map(str.isalnum, word))]
        n = max(len(real), 1)
        yield _below("too few words", len(real), rules.min_words)
        yield _above("too many words", len(real), rules.max_words)
        length = sum(map(len, real)) / n
        yield _below("words too short", length, rules.min_word_length)
        yield _above("words too long", length, rules.max_word_length)
        yield _above("too many hash signs", text.count("#") / n, rules.max_symbol_ratio)
        yield _above("too many ellipses", sum(map(text.count, ELLIPSES)) / n, rules.max_symbol_ratio)
        bullets = share(line.lstrip().startswith(BULLETS) for line in lines)
        yield _above("too many bullets", bullets, rules.max_bullet_lines)
        ellipses = share(line.rstrip().endswith(ELLIPSES) for line in lines)
        yield _above("too many lines that end with an ellipsis", ellipses, rules.max_ellipsis_lines)
        alphabetic = share(any(map(str.isalpha, word)) for word in words)
        yield _below("too few words with a letter", alphabetic, rules.min_alphabetic_words)
        stop = sum(word.strip(".,;:!?\"'()").casefold() in self.stop for word in words)
        yield _below("too few stop words", stop, rules.min_stop_words)


class GopherRepetitionRules:
    """Gopher's rules on repetition."""

    name = "filter.gopher_repetition"

    def __init__(self, rules: GopherRepetition) -> None:
        self.rules = rules

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [_first(self._faults(whole(item.row)), item) for item in items]

    def _faults(self, text: str) -> Iterator[tuple[str, float] | None]:
        rules, n = self.rules, max(len(text), 1)
        again, characters = repeated(paragraphs(text))
        yield _above("repeated paragraphs", again, rules.max_duplicate_paragraphs)
        yield _above("characters in repeated paragraphs", characters / n, rules.max_duplicate_paragraph_characters)
        again, characters = repeated([line for line in text.splitlines() if line.strip()])
        yield _above("repeated lines", again, rules.max_duplicate_lines)
        yield _above("characters in repeated lines", characters / n, rules.max_duplicate_line_characters)
        words = SPLIT.findall(text)[:MOST_WORDS]
        n = max(sum(map(len, words)), 1)
        for length, most in rules.max_top_ngrams.items():
            yield _above(f"one {length}-gram too often", top_ngram(words, int(length)) / n, most)
        for length, most in rules.max_duplicate_ngrams.items():
            yield _above(f"repeated {length}-grams", repeated_ngrams(words, int(length)) / n, most)


class C4Rules:
    """C4's rules. Lines go out of texts alone: a turn without some of its lines would say something else."""

    name = "filter.c4"

    def __init__(self, rules: C4) -> None:
        self.rules = rules

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [self._verdict(item) for item in items]

    def _verdict(self, item: Item) -> Verdict:
        text = whole(item.row)
        if self.rules.lorem_ipsum and "lorem ipsum" in text.casefold():
            return drop("lorem ipsum")
        if self.rules.curly_brackets and "{" in text:
            return drop("a curly bracket")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        cut = item.kind == "text"
        kept = [line for line in lines if not self._is_clutter(line)] if cut else lines
        enough = _below("too few sentences", sum(len(sentences(line)) for line in kept), self.rules.min_sentences)
        if enough or not kept:
            return drop(*_told(enough or ("no line is left", 0)))
        if len(kept) == len(lines):
            return keep(item)
        row = item.row._replace(text="\n".join(kept))
        return change(item._replace(row=row), {"lines taken out": len(lines) - len(kept)})

    def _is_clutter(self, line: str) -> bool:
        rules, words, small = self.rules, SPLIT.findall(line), line.casefold()
        bare = CITATION.sub("", line).rstrip()
        return bool(
            (rules.max_word_characters and any(len(word) > rules.max_word_characters for word in words))
            or (rules.terminal_punctuation and (not bare.endswith(ENDS) or bare.endswith("...")))
            or len(words) < (rules.min_line_words or 0)
            or (rules.javascript and "javascript" in small)
            or (rules.policies and any(phrase in small for phrase in POLICIES))
        )


class FineWebRules:
    """FineWeb's rules."""

    name = "filter.fineweb"

    def __init__(self, rules: FineWeb) -> None:
        self.rules = rules

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item."""
        return [_first(self._faults(whole(item.row)), item) for item in items]

    def _faults(self, text: str) -> Iterator[tuple[str, float] | None]:
        rules, lines = self.rules, text.split("\n")
        ended = share(line.endswith(ENDS) for line in lines)
        if rules.min_punctuated_lines is not None and ended <= rules.min_punctuated_lines:
            yield "too few lines end with punctuation", ended
        short = share(len(line) <= rules.short_line for line in lines)
        if rules.max_short_lines is not None and short >= rules.max_short_lines:
            yield "too many short lines", short
        again = repeated([line for line in lines if line.strip()])[1] / max(len(text.replace("\n", "")), 1)
        if rules.max_duplicate_characters is not None and again >= rules.max_duplicate_characters:
            yield "characters in repeated lines", again
        breaks = text.count("\n") / max(len(SPLIT.findall(text)), 1)
        yield _above("too many line breaks", breaks, rules.max_line_breaks)


def _above(reason: str, value: float, most: float | None) -> tuple[str, float] | None:
    return (reason, value) if most is not None and value > most else None


def _below(reason: str, value: float, least: float | None) -> tuple[str, float] | None:
    return (reason, value) if least is not None and value < least else None


def _first(faults: Iterator[tuple[str, float] | None], item: Item) -> Verdict:
    fault = next(filter(None, faults), None)
    return drop(*_told(fault)) if fault else keep(item)


def _told(fault: tuple[str, float]) -> tuple[str, str]:
    reason, value = fault
    return reason, f"{value:.4g}"
