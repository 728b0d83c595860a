"""Shares and counts by which texts are judged: pure functions of a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[”’」』）]*")  # where one ends
PARAGRAPH = re.compile(r"\n\s*\n")
ELLIPSES = ("...", "…")
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "-", "*")


def sentences(text: str) -> list[str]:
    """The sentences of a text, split after marks that end one and at line breaks; their joint is not kept."""
    return [part.strip() for line in text.splitlines() for part in SENTENCE.split(line) if part and part.strip()]


def paragraphs(text: str) -> list[str]:
    """What blank lines part."""
    return [part for part in PARAGRAPH.split(text.strip()) if part.strip()]


def symbols(text: str) -> float:
    """Share of characters, blanks not counted, that are neither letters, digits nor marks of writing."""
    seen = [c for c in text if not c.isspace()]
    odd = sum(not (c.isalnum() or c == "_" or _is_mark(c)) for c in seen)
    return odd / max(len(seen), 1)


def digits(text: str) -> float:
    """Share of characters, blanks not counted, that are digits."""
    seen = sum(not c.isspace() for c in text)
    return sum(map(str.isdigit, text)) / max(seen, 1)


def share(flags: Iterable[bool]) -> float:
    """Of those that are true; 0 of none."""
    flags = list(flags)
    return sum(flags) / max(len(flags), 1)


def repeated(parts: Sequence[str]) -> tuple[float, int]:
    """Share of parts that stand earlier in the list too, and the characters in them."""
    seen, count, characters = set[str](), 0, 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    return count / max(len(parts), 1), characters


def top_ngram(words: Sequence[str], n: int) -> int:
    """Characters, without blanks, of the most frequent n-gram, all its places together; 0 where none repeats."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not counts:
        return 0
    most = max(counts.values())
    return most * max(sum(map(len, gram)) for gram, count in counts.items() if count == most) if most > 1 else 0


def repeated_ngrams(words: Sequence[str], n: int) -> int:
    """Characters, without blanks, of n-grams that stand earlier in the text, none counted twice."""
    seen, characters, at = set[tuple[str, ...]](), 0, 0
    while at + n <= len(words):
        gram = tuple(words[at : at + n])
        if gram in seen:
            characters += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters


def _is_mark(c: str) -> bool:
    """Marks that belong to writing: punctuation of sentences, and signs that combine with letters."""
    return c in ".,;:!?'\"()-–—’‘“”…¿¡、。，；：？！（）「」『』《》" or "\u0300" <= c <= "\u036f" or c.isidentifier()
