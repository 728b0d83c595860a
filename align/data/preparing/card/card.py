"""The observer `card`: counts rows batch by batch, and adds the counts up to one card."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from align.data.formats.rows import Fault, Row
from align.data.formats.shown import shown
from align.data.preparing.card.oddities import CANDIDATES, MEASURES, histogram, measures, oddest
from align.data.preparing.duplicates.same import everything, normalised
from align.data.preparing.languages import available, language
from align.data.preparing.privacy import Privacy
from align.data.preparing.step import Item
from align.data.preparing.texts import whole
from align.data.preparing.tokens import words_in

LISTED = 10  # rows of a list
EXCERPT = 160  # characters of a row that is shown
MOST_NAMES = 200  # of labels, languages, kinds of faults; the rest is counted together
OTHERS = "others"
BINS = 40  # of the histogram of lengths


class Card:
    """Counts what is there. The same rows give the same card, however they are cut into batches.

    Lengths are `tokens` where there is a tokenizer, else words. `private` masks what is shown, where it is given.
    Languages are counted where the libraries that tell them are installed.
    """

    name = "card"

    def __init__(
        self,
        sources: Sequence[str],
        tokens: Callable[[Row], int] | None,
        private: Privacy | None = None,
    ) -> None:
        self.sources, self.tokens, self.languages = list(sources), tokens, available()
        self.masked = private.masked if private else _as_it_is
        self.hide = lru_cache(maxsize=4096)(private.hide if private else str)

    def observe(self, items: Sequence[Item], faults: Sequence[Fault]) -> dict[str, Any]:
        """Of one batch."""
        texts = [whole(item.row) for item in items]
        lengths = [self.tokens(item.row) if self.tokens else words_in(item.row) for item in items]
        counts = {
            "kinds": Counter(item.kind for item in items),
            "turns": Counter(str(turns_of(item.row)) for item in items),
            "labels": Counter(self.hide(label) for label in map(label_of, items) if label is not None),
            "languages": Counter(language(text).code for text in texts) if self.languages else Counter(),
            "faults": Counter(kind_of(self.hide(fault.reason)) for fault in faults),
            "repairs": Counter(kind_of(self.hide(words)) for item in items for words in item.row.repairs),
            "remarks": Counter(kind_of(self.hide(words)) for item in items for words in item.row.remarks),
            "lengths": Counter(map(str, lengths)),
        }
        by_source = {"rows": [0] * len(self.sources), "length": [0] * len(self.sources)}
        for item, length in zip(items, lengths, strict=True):
            by_source["rows"][item.source] += 1
            by_source["length"][item.source] += length
        measured = [measures(text) for text in texts]
        once = list({(item.row.file, item.row.line): i for i, item in enumerate(items)}.values())
        longest = sorted(once, key=lambda i: (-lengths[i], i))[:LISTED]
        odd = [
            (name, measured[i][name], i)
            for name in MEASURES
            for i in sorted(once, key=lambda i, name=name: (-measured[i][name], i))[:CANDIDATES]
            if measured[i][name] > 0
        ]
        return {
            "rows": len(items),
            "invalid": len(faults),
            "characters": sum(map(len, texts)),
            "sources": by_source,
            **{name: dict(count) for name, count in counts.items()},
            "same": _coded([everything(item.row) for item in items]),
            "alike": _coded([normalised(item.row) for item in items]),
            "measures": {name: histogram([each[name] for each in measured]) for name in MEASURES} if items else {},
            "longest": [self._row(items[i]) | {"length": lengths[i]} for i in longest],
            "odd": [self._row(items[i]) | {"measure": m, "value": round(v, 4)} for m, v, i in odd],
            "first_faults": [[fault.file, fault.line, self.hide(fault.reason)] for fault in faults[:LISTED]],
        }

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The card."""
        names = ("kinds", "labels", "languages", "faults", "repairs", "remarks")
        counts = {name: _added(part[name] for part in parts) for name in (*names, "turns", "lengths")}
        shapes = {name: _added(part["measures"].get(name, {}) for part in parts) for name in MEASURES}
        rows = sum(part["rows"] for part in parts)
        longest = {(row["file"], row["line"]): row for part in parts for row in part["longest"]}.values()
        by_source = [
            {
                "source": source,
                "rows": sum(part["sources"]["rows"][i] for part in parts),
                "length": sum(part["sources"]["length"][i] for part in parts),
            }
            for i, source in enumerate(self.sources)
        ]
        return {
            "rows": rows,
            "invalid": sum(part["invalid"] for part in parts),
            "characters": sum(part["characters"] for part in parts),
            "unit": "tokens" if self.tokens else "words",
            "sources": by_source,
            "lengths": spread({int(length): count for length, count in counts["lengths"].items()}),
            "turns": {turns: counts["turns"][turns] for turns in sorted(counts["turns"], key=int)},
            **{name: _largest(counts[name]) for name in names},
            "duplicates": {
                "exact": _repeated([part["same"] for part in parts]),
                "normalised": _repeated([part["alike"] for part in parts]),
            },
            "longest": sorted(longest, key=_longest_first)[:LISTED],
            "oddest": oddest([row for part in parts for row in part["odd"]], shapes, LISTED) if rows else [],
            "first_faults": [fault for part in parts for fault in part["first_faults"]][:LISTED],
        }

    def _row(self, item: Item) -> dict[str, Any]:
        text = whole(self.masked(item).row)
        more = "…" if len(text) > EXCERPT else ""
        return {"file": item.row.file, "line": item.row.line, "text": shown(text[:EXCERPT]) + more}


def turns_of(row: Row) -> int:
    """Turns of a conversation, the answers to compare counted as one; 0 for a text."""
    return 0 if row.messages is None else len(row.messages) + bool(row.answers)


def label_of(item: Item) -> str | None:
    """The class of a text, or what a labelled answer is; None for rows without a label."""
    if item.kind == "labelled":
        return "desirable" if item.row.targets[0] > 0.5 else "undesirable"
    return item.row.label


def kind_of(reason: str) -> str:
    """A reason without what differs from row to row: numbers as N, quoted words as '…'."""
    return re.sub(r"\d[\d,.]*\d|\d", "N", re.sub(r"(['\"]).*?\1", "'…'", reason))


def spread(counts: Mapping[int, int]) -> dict[str, Any]:
    """Of lengths: {length: rows} -> their quantiles, mean and histogram; null values where there is none."""
    if not counts:
        return {"min": None, "median": None, "p90": None, "p99": None, "max": None, "mean": None, "total": 0}
    values = np.array(sorted(counts))
    rows = np.array([counts[value] for value in values.tolist()])
    reached = np.cumsum(rows)
    quantiles = {
        name: int(values[np.searchsorted(reached, q * reached[-1])])
        for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    total = int((values * rows).sum())
    # The longest hundredth is drawn in one bin, so that one long row does not hide the others.
    last = max(quantiles["p99"], int(values[0]) + 1)
    bins = min(BINS, last - int(values[0]) + 1)
    edges = np.linspace(int(values[0]), last, bins + 1)
    drawn = np.histogram(np.minimum(values, last), edges, weights=rows)[0].astype(int)
    return {
        "min": int(values[0]), **quantiles, "max": int(values[-1]), "mean": round(total / int(rows.sum()), 2),
        "total": total, "edges": [round(float(edge), 3) for edge in edges], "counts": drawn.tolist(),
    }  # fmt: skip


def _longest_first(row: Mapping[str, Any]) -> tuple[int, str, int]:
    return -row["length"], row["file"], row["line"]


def _added(parts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def _largest(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first, equals by their names; beyond MOST_NAMES, counted together."""
    order = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(count for _, count in order[MOST_NAMES:])
    return dict(order[:MOST_NAMES]) | ({OTHERS: rest} if rest else {})


def _coded(values: Sequence[str]) -> str:
    """Hashes of 8 bytes, as JSON can hold them."""
    return base64.b64encode(
        b"".join(blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest() for value in values)
    ).decode()


def _repeated(parts: Sequence[str]) -> dict[str, int]:
    """How many rows repeat an earlier one, and how often the most frequent comes."""
    hashes = np.frombuffer(b"".join(map(base64.b64decode, parts)), np.uint64)
    _, counts = np.unique(hashes, return_counts=True)
    return {"rows": int(len(hashes) - len(counts)), "most": int(counts.max(initial=0))}


def _as_it_is(item: Item) -> Item:
    return item
