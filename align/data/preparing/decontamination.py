"""Rows that hold items of a test set: word n-grams that both have, as published reports of contamination count them.

An item is contaminated where most of its words stand in n-grams that the row has too. The share of its words, not of
its n-grams, is counted, as Llama 2's report does (Touvron et al. 2023, arXiv 2307.09288, A.6): one changed word
breaks n of the n-grams, but hides only itself and what stands too close to another change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from align.data.formats.formats import read_rows
from align.data.formats.prompts import PROMPTING
from align.data.formats.rows import Row
from align.data.preparing.grams import grams_at
from align.data.preparing.step import Item, Verdict, drop, keep
from align.data.preparing.texts import normal, texts_of
from align.recipe.errors import UserError
from align.recipe.source import Source

LEAST_WORDS = 4  # of an item; fewer stand in every second text
COMMON = 32  # items that one n-gram may be of; one of more is their template, and says nothing of an item


class Measured(NamedTuple):
    """An item of a test set."""

    place: str  # file:line
    words: list[str]


class Match(NamedTuple):
    """The item that a text holds most of."""

    place: str
    share: float  # of the item's words


class Index:
    """The n-grams of all items. It is held in memory, whatever streams by: 24 bytes an n-gram.

    An item of fewer than `ngram` words is one n-gram, of all its words. Words do not count that stand in no n-gram but
    those of more than COMMON items.
    """

    def __init__(self, items: Iterable[Measured], ngram: int) -> None:
        self.places: list[str] = []
        self.short = 0  # items that are too short to be looked for
        known, grams = set(), []  # (length, n-grams) of each item
        for place, words in items:
            if len(words) < min(LEAST_WORDS, ngram):
                self.short += 1
                continue
            size = min(ngram, len(words))
            found = ngrams(hashes(words), size)
            if (key := found.tobytes()) not in known:
                known.add(key)
                self.places.append(place)
                grams.append((size, found))
        self.lengths = np.zeros(len(grams), np.int64)  # words of each item that count
        # Length -> (m,) uint64 n-grams, ascending; (m,) int64 items they are of; (m,) int64 words they begin at
        self.tables = {size: self._table(grams, size) for size in sorted({size for size, _ in grams})}

    def best(self, text: Sequence[str]) -> Match | None:
        """Of the items that share an n-gram with `text`, in words, the one that it holds most of."""
        seen: dict[int, set[int]] = {}  # item -> its words that stand in the text
        row = hashes(text)
        for size, (values, owner, at) in self.tables.items():
            found = np.unique(ngrams(row, size))
            first, last = np.searchsorted(values, found, "left"), np.searchsorted(values, found, "right")
            for a, b in zip(first[last > first], last[last > first], strict=True):
                for item, word in zip(owner[a:b].tolist(), at[a:b].tolist(), strict=True):
                    seen.setdefault(item, set()).update(range(word, word + size))
        shares = [(len(words) / int(self.lengths[item]), -item) for item, words in seen.items()]
        share, item = max(shares, default=(0.0, 0))
        return Match(self.places[-item], share) if share else None

    def _table(self, grams: list[tuple[int, np.ndarray]], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        those = [i for i, (length, _) in enumerate(grams) if length == size]
        values = np.concatenate([grams[i][1] for i in those])
        owner = np.repeat(those, [len(grams[i][1]) for i in those])
        at = np.concatenate([np.arange(len(grams[i][1])) for i in those])
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= COMMON
        values, owner, at = values[telling], owner[telling], at[telling]
        covered = np.concatenate([owner * (1 << 32) + at + i for i in range(size)])  # each of their words, once
        self.lengths += np.bincount(np.unique(covered) >> 32, minlength=len(grams))
        order = np.argsort(values, kind="stable")
        return values[order], owner[order], at[order]


def items_of(sources: Sequence[Source]) -> Iterator[Measured]:
    """What each row of the test sets asks. Raises UserError where a set cannot be read, or none of its rows."""
    for source in sources:
        count = 0
        for row in read_rows(source, PROMPTING):
            if isinstance(row, Row):
                count += 1
                yield Measured(f"{row.file}:{row.line}", normal(_asked(row)))
        if not count:
            raise UserError(f"decontaminate.against: {source.path}: none of its rows can be read as a prompt or a text")


def _asked(row: Row) -> str:
    if row.messages is None:
        return row.text
    return "\n\n".join(message["content"] for message in row.messages if message["role"] != "system")


class Decontaminate:
    """The step `decontaminate`: a row that holds `threshold` of the words of an item, or more, goes."""

    name = "decontaminate"

    def __init__(self, index: Index, threshold: float) -> None:
        assert 0 < threshold <= 1, threshold
        self.index, self.threshold = index, threshold

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item; the example names the item of the test set, without its words."""
        return [self._verdict(item) for item in items]

    def _verdict(self, item: Item) -> Verdict:
        match = self.index.best([word for text in texts_of(item.row) for word in normal(text)])
        if match is None or match.share < self.threshold:
            return keep(item)
        return drop("holds an item of a test set", f"{match.share:.0%} of the words of {match.place}")


def hashes(words: Sequence[str]) -> np.ndarray:
    """(len(words),) uint64."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of (w,) words -> (w - n + 1,) uint64, hashes of their n-grams; none where there are fewer words."""
    return grams_at(words, np.arange(len(words) - n + 1), n)


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
