"""Labels of classes: which ways of writing one are the same, which only look so, and rows of a text and its label."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any
from unicodedata import normalize

from align.data.formats.rows import Formats, Refused, Row, Shape
from align.data.formats.shown import a, meant, shown
from align.data.formats.values import encodable, filled
from align.data.formats.verdicts import number, truth
from align.recipe.errors import UserError

NAMED = 10  # pairs of labels that look alike


def spelled(at: str, value: Any) -> str:
    """A label as text; Parquet makes 1.0 of a 1 where others are missing."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and value == value and abs(value) < 2**53:
        return repr(value) if value != int(value) else str(int(value))
    if not isinstance(value, str):
        raise Refused(f"{at}: expected a label, found {a(value)}")
    if not value.strip():
        raise Refused(f"{at}: expected a label, found an empty text")
    return value.strip()


def key_of(label: str) -> Hashable:
    """What tells labels apart, and as text how one is written best: `1`, `1.0` and `01` are one number, `True` and
    `true` one truth."""
    if number(label) is not None:
        value = Decimal(label)
        return int(value) if value == int(value) else value.normalize()
    return label.lower() if label.lower() in ("true", "false") else label


def by_key(labels: Sequence[str]) -> dict[Hashable, str]:
    """The labels by their keys. Raises UserError where two are the same."""
    known: dict[Hashable, str] = {}
    for label in labels:
        other = known.setdefault(key_of(label), label)
        if other != label:
            raise UserError(f"classify.labels: {other!r} and {label!r} are two ways to write one label; leave one out")
    return known


def alike(labels: Sequence[str]) -> list[str]:
    """Warnings for labels that look like one: in upper and lower case, or a number and the truth that it stands for."""
    groups: dict[Hashable, list[str]] = {}
    for label in labels:
        groups.setdefault(_look(label), []).append(label)
    told = [
        f"warning: {' and '.join(map(repr, same))} are {len(same)} classes; if they are meant as one, write them alike"
        for same in groups.values()
        if len(same) > 1
    ]
    more = [f"warning: … and {len(told) - NAMED:,} more groups of labels that look alike"] * (len(told) > NAMED)
    return told[:NAMED] + more


def order(label: str) -> tuple[bool, float, str]:
    """Numbers in their order, then texts in theirs."""
    value = number(label)
    return value is None, value or 0.0, label


def formats(labels: Sequence[str] | None) -> Formats:
    """Rows with a text and one of `labels`, or any label where these are not yet known."""
    known = None if labels is None else by_key(labels)
    return {"classes": Shape(("text", "label"), (), (), partial(_read, known))}


def _read(known: Mapping[Hashable, str] | None, row: dict[str, Any]) -> Row:
    text = encodable("text", filled("text", row.get("text")))
    written = encodable("label", spelled("label", row.get("label")))
    if known is None:
        return Row("", 0, None, text, None, label=written)
    label = known.get(key_of(written))
    if label is None:
        names = list(known.values())
        some = shown(", ".join(names[:10]), 400) + ", …" * (len(names) > 10)
        raise Refused(f"label: expected one of {some}, found {written[:40]!r}{meant(written, names)}")
    remarks = () if written == label else (f"the label {written[:40]!r} counts as {label[:40]!r}",)
    return Row("", 0, None, text, None, label=label, remarks=remarks)


def _look(label: str) -> Hashable:
    said = truth(label)
    if said is not None or number(label) is not None:
        return said, None if said is not None else key_of(label)
    return re.sub(r"[\s_-]+", " ", normalize("NFKC", label).casefold()).strip()
