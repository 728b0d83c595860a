"""The labelled file: texts with their private values marked as `[[KIND:value]]`, and how well finders do on them.

In the file, `¦` parts the forms of keys, so that scanners for leaked secrets leave it alone; it is taken out here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from align.data.preparing.private.found import Found

FILE = Path(__file__).with_suffix(".jsonl")
MARK = re.compile(r"\[\[([A-Z]+):(.*?)\]\](?!\])", re.DOTALL)


class Labelled(NamedTuple):
    """A text and where its private values stand."""

    language: str
    text: str
    values: list[tuple[str, int, int]]  # kind, first character, the one after the last


class Score(NamedTuple):
    """Found of those marked, and marked of those found."""

    right: int
    marked: int
    found: int
    missed: list[str]
    wrong: list[str]

    @property
    def recall(self) -> float:
        return self.right / max(self.marked, 1)

    @property
    def precision(self) -> float:
        return 1 - len(self.wrong) / max(self.found, 1)


def labelled() -> list[Labelled]:
    """All texts of the file."""
    return [_parsed(json.loads(line)) for line in FILE.read_text("utf-8").splitlines()]


def score(texts: Sequence[Labelled], found: Sequence[Sequence[Found]]) -> dict[str, Score]:
    """By kind, and over all. A value is found where no letter or digit of it is left; a finding that touches no marked
    value of its kind is wrong."""
    right, marked, seen, missed, wrong = Counter(), Counter(), Counter(), {}, {}
    for each, finds in zip(texts, found, strict=True):
        for kind, start, end in each.values:
            covered = {i for find in finds if find.kind == kind for i in range(find.start, find.end)}
            left = [i for i in range(start, end) if each.text[i].isalnum() and i not in covered]
            for name in (kind, "all"):
                marked[name] += 1
                right[name] += not left
            if left:
                missed.setdefault(kind, []).append(each.text[start:end])
        for find in finds:
            seen[find.kind] += 1
            seen["all"] += 1
            if not any(k == find.kind and find.start < end and start < find.end for k, start, end in each.values):
                wrong.setdefault(find.kind, []).append(each.text[find.start : find.end])
    missed["all"] = [value for values in list(missed.values()) for value in values]
    wrong["all"] = [value for values in list(wrong.values()) for value in values]
    return {
        kind: Score(right[kind], marked[kind], seen[kind], missed.get(kind, []), wrong.get(kind, []))
        for kind in sorted({*marked, *seen})
    }


def _parsed(row: dict[str, str]) -> Labelled:
    text, values, end = "", [], 0
    raw = row["text"].replace("¦", "")
    for match in MARK.finditer(raw):
        text += raw[end : match.start()]
        values.append((match[1], len(text), len(text) + len(match[2])))
        text += match[2]
        end = match.end()
    return Labelled(row["lang"], text + raw[end:], values)
