"""Rows that hold items of a test set: word n-grams that both have, as published reports of contamination count them.

An item is contaminated where most of its words stand in n-grams that the row has too. The share of its words, not of
its n-grams, is counted, as Llama 2's report does (Touvron et al. 2023, arXiv 2307.09288, A.6): one changed word
breaks n of the n-grams, but hides only itself and what stands too close to another change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from align.data.preparing.step import Item, Verdict, drop, keep
from align.data.preparing.texts import normal, texts_of

LEAST_WORDS = 4  # of an item; fewer stand in every second text

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Measured(NamedTuple):
    """An item of a test set."""

    place: str  # file:line
    words: tuple[str, ...]


class Match(NamedTuple):
    """The item that a text holds most of."""

    item: int  # place in the index
    share: float  # of the item's words


class Index:
    """The n-grams of all items, m of them, sorted; it is held in memory, whatever streams by.

    Items of fewer than n words are one n-gram as long as they are.
    """

    def __init__(self, items: Sequence[Measured], ngram: int) -> None:
        self.items = [item for item in items if len(item.words) >= min(LEAST_WORDS, ngram)]
        self.passed_over = len(items) - len(self.items)
        self.lengths = np.array([len(item.words) for item in self.items], np.int64)
        self.sizes = sorted({min(ngram, int(length)) for length in self.lengths}, reverse=True)  # lengths of n-grams
        self.tables = {}
        for size in self.sizes:
            those = [i for i, length in enumerate(self.lengths) if min(ngram, length) == size]
            grams = [ngrams(hashes(self.items[i].words), size) for i in those]
            values = np.concatenate(grams)
            owner = np.repeat(those, [len(each) for each in grams])
            at = np.concatenate([np.arange(len(each)) for each in grams])
            order = np.argsort(values, kind="stable")
            # (m,) uint64 n-grams, ascending; (m,) int64 items they are of; (m,) int64 word of the item they begin at
            self.tables[size] = values[order], owner[order], at[order]

    def best(self, text: Sequence[str]) -> Match | None:
        """Of the items that share an n-gram with `text`, in words, the one that it holds most of."""
        seen: dict[int, set[int]] = {}  # item -> its words that stand in the text
        row = hashes(text)
        for size, (values, owner, at) in self.tables.items():
            grams = np.unique(ngrams(row, size))
            first, last = np.searchsorted(values, grams, "left"), np.searchsorted(values, grams, "right")
            for a, b in zip(first[last > first], last[last > first], strict=True):
                for item, word in zip(owner[a:b].tolist(), at[a:b].tolist(), strict=True):
                    seen.setdefault(item, set()).update(range(word, word + size))
        shares = [Match(item, len(words) / int(self.lengths[item])) for item, words in seen.items()]
        return max(shares, key=lambda match: (match.share, -match.item), default=None)


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
        place = self.index.items[match.item].place
        return drop("holds an item of a test set", f"{match.share:.0%} of the words of {place}")


def hashes(words: Sequence[str]) -> np.ndarray:
    """(len(words),) uint64."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of (w,) words -> (w - n + 1,) uint64, hashes of their n-grams; none where there are fewer words."""
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for i in range(n):
        found = (found ^ words[i : i + count]) * _MULTIPLIER
        found ^= found >> np.uint64(29)
    return found


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
