"""What makes a text odd among others: measures of it, each in [0, 1], and how far from the middle of all rows it is."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 200  # of a measure, in a histogram that batches can add up
CANDIDATES = 3  # rows of a batch that are kept for each measure
LONGEST_WORD = 10_000  # characters at which the measure is 1
LOOKED_AT = 50_000  # characters of a text
COMPRESSED_FROM = 200  # characters; shorter texts do not compress
LEAST_SPREAD = 0.02  # of a measure; below it, rounding would look odd

MEASURES = {  # name -> in words, of a row in which it is high
    "symbols": "many symbols",
    "digits": "many digits",
    "capitals": "many capitals",
    "unprintable": "control characters or broken encoding",
    "longest_word": "a very long word",
    "repetition": "repeats itself",
    "disorder": "without order, like keys or encoded data",
}
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]|Ã[\x80-\xbf©¨ª«¼¶¤]|â€")


def measures(text: str) -> dict[str, float]:
    """The measures of a text, each in [0, 1]."""
    text = text[:LOOKED_AT]
    n = max(len(text), 1)
    letters = sum(map(str.isalpha, text))
    figures = sum(map(str.isdigit, text))
    blanks = sum(map(str.isspace, text))
    longest = max(map(len, text.split()), default=0)
    unspaced = letters and not text.isascii() and longest > 50  # scripts without blanks have no long words
    ratio = _compressed(text)
    return {
        "symbols": (n - letters - figures - blanks) / n,
        "digits": figures / n,
        "capitals": sum(map(str.isupper, text)) / max(letters, 20),
        "unprintable": min(1.0, 20 * len(_BROKEN.findall(text)) / n),
        "longest_word": 0.0 if unspaced else min(1.0, math.log(max(longest, 1)) / math.log(LONGEST_WORD)),
        "repetition": 0.0 if ratio is None else 1 - ratio,
        "disorder": 0.0 if ratio is None else ratio,
    }


def histogram(values: Sequence[float]) -> dict[str, int]:
    """Of measures: number of the bin, as text -> rows in it; empty bins left out."""
    numbers, counts = np.unique(np.minimum((np.asarray(values) * BINS).astype(int), BINS - 1), return_counts=True)
    return {str(number): int(count) for number, count in zip(numbers, counts, strict=True)}


def middle(counts: Mapping[str, int]) -> tuple[float, float]:
    """The median of a histogram, and its spread: from the median to the 95th percentile."""
    numbers = np.array(sorted(map(int, counts)))
    reached = np.cumsum([counts[str(number)] for number in numbers])
    median, high = ((numbers[np.searchsorted(reached, q * reached[-1])] + 0.5) / BINS for q in (0.5, 0.95))
    return float(median), max(float(high - median), LEAST_SPREAD)


def oddest(candidates: Sequence[dict[str, Any]], counts: Mapping[str, Mapping[str, int]], most: int) -> list[Any]:
    """The rows that are farthest from the median of a measure, in spreads of it; each with what is odd about it.

    Candidates are rows with the highest values of some measure, so the farthest of all rows is among them.
    """
    middles = {name: middle(each) for name, each in counts.items()}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in candidates:
        median, spread = middles[row["measure"]]
        how = (row["value"] - median) / spread
        known = found.get((row["file"], row["line"]))
        if how > 1 and (known is None or how > known["spreads"]):
            odd = {"what": MEASURES[row["measure"]], "typical": round(median, 4), "spreads": round(how, 2)}
            found[row["file"], row["line"]] = row | odd
    return sorted(found.values(), key=lambda row: (-row["spreads"], row["file"], row["line"]))[:most]


def _compressed(text: str) -> float | None:
    """Bytes after compression over bytes before; None for what is too short to tell."""
    if len(text) < COMPRESSED_FROM:
        return None
    raw = text.encode("utf-8", "replace")
    return min(1.0, len(zlib.compress(raw, 1)) / len(raw))
