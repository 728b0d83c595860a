"""Sentences and paragraphs that stood in an earlier text are taken out of later ones.

As C4 does it with spans of three sentences (Raffel et al. 2020, section 2.2), and CCNet with paragraphs (Wenzek et al.
2020). Only texts without a label are cut: a turn without some of its sentences says something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from align.data.preparing.filters.ratios import PARAGRAPH, SENTENCE
from align.data.preparing.step import Decision, Item, Sketch, Sketches, Verdict, change, drop
from align.data.preparing.texts import normal
from align.recipe.preparing.duplicates import Repeated

Span = tuple[int, int]  # first and last character (excluded) of a part
SHARES = 64  # in which the hashes of all parts are looked at, so that only one share is in memory
CHUNK = 1 << 20  # hashes that are read at once
ENDS = re.compile(rf"(?:{SENTENCE.pattern})\s*|\s*\n\s*")


class RepeatedParts:
    """Parts of texts that repeat earlier ones."""

    where, raw = "workers", False

    def __init__(self, name: str, what: str, section: Repeated, parts: Callable[[str], list[Span]]) -> None:
        """`what`: the parts, in a word; `parts` finds them in a text."""
        self.name, self.what, self.section, self.parts = name, what, section, parts

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """`part`, ragged, uint64: a hash of each span of parts, 0 for one that is too short to count."""
        hashes = [self._hashes(item.row.text) if item.kind == "text" else [] for item in items]
        counts = np.array(list(map(len, hashes)), np.int64)
        return {"part": np.array([one for row in hashes for one in row], np.uint64), "part/counts": counts}

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """See SetStep; `cuts` are the places of spans among the row's."""
        hashes, starts = sketches.ragged("part")
        again = np.flatnonzero(later(hashes, np.repeat(alive, np.diff(starts))))
        row = np.searchsorted(starts, again, side="right") - 1
        cuts = np.zeros(len(starts), np.int64)
        np.add.at(cuts, row + 1, 1)
        counts = {"repeated": len(again), "rows": len(np.unique(row))}
        return Decision(cuts=(again - starts[row], np.cumsum(cuts)), counts=counts)

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """The text without these spans."""
        text, spans = item.row.text, self.parts(item.row.text)
        gone = sorted({int(first) + i for first in cuts for i in range(self.section.span)})
        left, at = [], 0
        for i in gone:
            left.append(text[at : spans[i][0]])
            at = spans[i][1]
        rest = "".join([*left, text[at:]]).strip()
        if not rest:
            return drop(f"every one of its {self.what} stood in an earlier text")
        return change(item._replace(row=item.row._replace(text=rest)), {self.what: len(gone)})

    def _hashes(self, text: str) -> list[int]:
        words, span = [normal(text[a:b]) for a, b in self.parts(text)], self.section.span
        spans = [words[i : i + span] for i in range(len(words) - span + 1)]
        return [_hash(part) if sum(map(len, part)) >= self.section.min_words else 0 for part in spans]


def sentence_spans(text: str) -> list[Span]:
    """Every sentence with the blanks that follow it."""
    return _between(text, ENDS)


def paragraph_spans(text: str) -> list[Span]:
    """Every paragraph with the blank lines that follow it."""
    return _between(text, PARAGRAPH)


def later(hashes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(m,) bool, whether a hash that is `kept` and not 0 stands among those before it too."""
    found = np.zeros(len(hashes), bool)
    for share in range(SHARES):
        at, value = [], []
        for start in range(0, len(hashes), CHUNK):
            part = np.asarray(hashes[start : start + CHUNK])
            mine = np.flatnonzero((part % SHARES == share) & (part != 0) & kept[start : start + CHUNK])
            at.append(start + mine)
            value.append(part[mine])
        places, values = (np.concatenate(arrays) if arrays else np.zeros(0, np.int64) for arrays in (at, value))
        _, first = np.unique(values, return_index=True)
        again = np.ones(len(places), bool)
        again[first] = False
        found[places[again]] = True
    return found


def _between(text: str, ends: re.Pattern[str]) -> list[Span]:
    edges = [0, *(found.end() for found in ends.finditer(text)), len(text)]
    return [(a, b) for a, b in pairwise(edges) if text[a:b].strip()]


def _hash(parts: list[list[str]]) -> int:
    words = "\n".join(" ".join(part) for part in parts)
    return int.from_bytes(blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1
