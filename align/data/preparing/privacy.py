"""Private values give way to placeholders: `<EMAIL_1>`, `<PHONE_2>`, …, one for each value throughout a row."""

from __future__ import annotations

import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from align.data.preparing.private.accounts import cards, ibans
from align.data.preparing.private.contacts import addresses, emails
from align.data.preparing.private.found import WORD, Found, folded
from align.data.preparing.private.hints import hint
from align.data.preparing.private.identities import identities
from align.data.preparing.private.phones import COUNTRIES, phones
from align.data.preparing.private.secrets import secrets
from align.data.preparing.step import Item, Verdict, change, keep

KINDS = ("KEY", "EMAIL", "IBAN", "CARD", "ID", "IP", "PHONE")  # where two overlap, the first counts
EXCERPT = 60  # characters on either side of a placeholder in the report

# Texts -> what else is found in each, such as NAME by a model
Names = Callable[[Sequence[str]], Sequence[Sequence[Found]]]

_PLACEHOLDER = re.compile(r"<([A-Z]+(?:_[A-Z]+)*)_(\d{1,9})>")
_CUT = re.compile(r"(?:[\d+][\d .()/-]*|[^\s'\"…]{4,})\s?(?:…|\.\.\.)|^…\s?(?:[\d .()/-]{4,}|[^\s…]{4,})")
_UNTOUCHED = frozenset(("role", "type", "train"))  # keys of messages and tools whose values are words of the format
_RANK = {kind: rank for rank, kind in enumerate(KINDS)}
_SEEN = 64  # rows whose verdict is kept
_AT_ONCE = 500  # values that are looked for at once
_LEAST = 6  # letters of a value that is looked for in the other texts of its row too


class Masked(NamedTuple):
    """A value of JSON without private values, and how many were found, by kind."""

    value: Any
    counts: Mapping[str, int]


class Privacy:
    """The step `privacy`: every text of a row with placeholders in place of private values of these `kinds`.

    `countries` (ISO 3166): whose national telephone and personal numbers are looked for; default: all that are known.
    """

    name = "privacy"

    def __init__(
        self, kinds: Sequence[str] = KINDS, countries: Sequence[str] | None = None, names: Names | None = None
    ) -> None:
        assert set(kinds) <= set(KINDS), kinds
        self.kinds, self.countries, self.names = tuple(kinds), countries, names
        self.seen: dict[int, tuple[Item, Verdict]] = {}  # rows that the card has shown, by their number

    def look(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item: as it is, or with placeholders. The example shows the text around the first one."""
        known = [self.seen.get(item.number, (None, None)) for item in items]
        return [v if k is item else self._verdict(item) for item, (k, v) in zip(items, known, strict=True)]

    def mask(self, value: Any) -> Masked:
        """A value of JSON, of any depth, as one document: a private value has one placeholder in all its texts."""
        texts = list(dict.fromkeys(_texts(value)))
        found = self.find(texts)
        told = {text[f.start : f.end]: f for (_, text), finds in zip(texts, found, strict=True) for f in finds}
        hidden = {raw: f for raw, f in told.items() if len(raw) >= _LEAST and not any(self._found("", raw))}
        spans = _everywhere([text for _, text in texts], found, hidden)
        if not any(spans):
            return Masked(value, {})
        placeholders = _Placeholders([text for _, text in texts])
        by_place = dict(zip(texts, spans, strict=True))
        written = {place: placeholders.write(place[1], each) for place, each in by_place.items() if each}
        masked = _mapped(value, lambda key, text: written.get((key, text), text))
        return Masked(masked, Counter(each.kind for place in _texts(value) for each in by_place[place]))

    def hide(self, text: str, item: Item | None = None) -> str:
        """What a report may say of a text: without private values, and without words that an ellipsis cuts off, which
        may be parts of one. What the `item` that it comes from tells of a value counts too."""
        if not text:
            return text
        return _CUT.sub("…", self.mask([text, *(_document(item) if item else ())]).value[0])

    def masked(self, item: Item) -> Item:
        """The item with placeholders."""
        verdict = self._verdict(item)
        self.seen = {number: known for number, known in self.seen.items() if len(self.seen) < _SEEN}
        self.seen[item.number] = item, verdict
        return verdict.item

    def find(self, texts: Sequence[tuple[str, str]]) -> list[list[Found]]:
        """The private values in each text, in their order and apart from each other.

        With each text comes the key that it stands under, "" where it has none: digits under `phone` are a phone's.
        """
        plain = [text for _, text in texts]
        named = self.names(plain) if self.names else [()] * len(texts)
        return [_apart([*self._found(*text), *names]) for text, names in zip(texts, named, strict=True)]

    def _found(self, key: str, text: str) -> Iterator[Found]:
        said = f"{key}: " if key and _tells(key) else ""
        plain, places = folded(said + text)
        finders = {
            "KEY": secrets,
            "EMAIL": emails,
            "IBAN": ibans,
            "CARD": cards,
            "ID": lambda text: identities(text, self.countries),
            "IP": addresses,
            "PHONE": lambda text: phones(text, self.countries or COUNTRIES),
        }
        for kind, finder in finders.items():
            for each in finder(plain) if kind in self.kinds else ():
                start, end = each.start, each.end
                if places is not None:
                    start, end = places[start], places[end - 1] + 1
                if start >= len(said):
                    yield each._replace(start=start - len(said), end=end - len(said))

    def _verdict(self, item: Item) -> Verdict:
        row = item.row
        (messages, text, tools, answers, record), counts = self.mask(_document(item))
        if not counts:
            return keep(item)
        changed = row._replace(messages=messages, text=text, tools=tools, answers=tuple(answers))
        excerpts = (_excerpt(text) for _, text in _texts([messages, text, tools, answers, record]))
        return change(item._replace(row=changed, record=record), counts, next(filter(None, excerpts), ""))


def _document(item: Item) -> list[Any]:
    row = item.row
    return [row.messages, row.text, row.tools, list(row.answers), item.record]


class _Placeholders:
    """The placeholders of one row, numbered by kind in the order in which their values come."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.last: Counter[str] = Counter()  # of each kind, the last number that is taken
        self.known: dict[tuple[str, str], str] = {}
        for text in texts:  # of an earlier run
            for kind, number in _PLACEHOLDER.findall(text):
                self.last[kind] = max(self.last[kind], int(number))

    def write(self, text: str, found: Sequence[Found]) -> str:
        """The text with placeholders in place of what was found in it."""
        parts, end = [], 0
        for each in found:
            parts += [text[end : each.start], self.of(each)]
            end = each.end
        return "".join([*parts, text[end:]])

    def of(self, found: Found) -> str:
        key = found.kind, self._same(found)
        if key not in self.known:
            self.last[found.kind] += 1
            self.known[key] = f"<{found.kind}_{self.last[found.kind]}>"
        return self.known[key]

    def _same(self, found: Found) -> str:
        """The value that stands for it: part of a name, such as its surname, for the name that came before."""
        if found.kind != "NAME":
            return found.value
        words = set(found.value.split())
        others = (value for kind, value in self.known if kind == "NAME")
        return next((value for value in others if words <= set(value.split())), found.value)


def _apart(found: Sequence[Found]) -> list[Found]:
    """Without what overlaps a value of an earlier kind, or a longer one of its own; in the order of the text."""
    kept: list[Found] = []  # in the order of the text
    for each in sorted(found, key=lambda f: (_RANK.get(f.kind, len(KINDS)), f.start - f.end, f)):
        place = bisect(kept, each)
        before, after = kept[place - 1] if place else None, kept[place] if place < len(kept) else None
        if (before is None or before.end <= each.start) and (after is None or each.end <= after.start):
            kept.insert(place, each)
    return kept


def _everywhere(texts: Sequence[str], found: Sequence[Sequence[Found]], told: Mapping[str, Found]) -> list[list[Found]]:
    """What was found, and `told` wherever it stands: values that only words beside them, in one of the texts, tell."""
    values, everywhere = sorted(told, key=len, reverse=True), list(map(list, found))
    for at in range(0, len(values), _AT_ONCE):
        either = "|".join(map(re.escape, values[at : at + _AT_ONCE]))
        known = re.compile(rf"(?<![{WORD}])(?:{either})(?![{WORD}])")
        for text, each in zip(texts, everywhere, strict=True):
            each += [told[m[0]]._replace(start=m.start(), end=m.end()) for m in known.finditer(text)]
    return [_apart(each) for each in everywhere]


def _excerpt(text: str) -> str:
    """The text around its first placeholder; empty where it has none."""
    match = _PLACEHOLDER.search(text)
    if not match:
        return ""
    start, end = max(0, match.start() - EXCERPT), match.end() + EXCERPT
    return "…" * (start > 0) + " ".join(text[start:end].split()) + "…" * (end < len(text))


@lru_cache(maxsize=4096)
def _tells(key: str) -> bool:
    """Whether a key says what stands under it."""
    return hint(f"{key}:", len(key) + 1) is not None or any(secrets(f"{key}: 4pLk9Zq2Xw7Rt5Vb"))


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value of JSON with the key that it stands under, keys included; numbers too, as a card may be
    written as one."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _UNTOUCHED:
                yield "", name
                yield from _texts(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield key, str(value)


def _mapped(value: Any, write: Callable[[str, str], str], key: str = "") -> Any:
    """The value with every text as `write` gives it. A number becomes a text only where `write` changes it."""
    if isinstance(value, Mapping):
        kept = {name: inner for name, inner in value.items() if name in _UNTOUCHED}
        return {
            name if name in kept else write("", name): kept[name] if name in kept else _mapped(inner, write, name)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(inner, write, key) for inner in value]
    if isinstance(value, str):
        return write(key, value)
    if isinstance(value, int) and not isinstance(value, bool):
        written = write(key, str(value))
        return value if written == str(value) else written
    return value
