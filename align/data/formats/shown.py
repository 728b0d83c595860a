"""How messages show what stands in a user's files: values, names and words, printable and short.

Text from a file may hold control codes that a terminal obeys, half surrogate pairs that no terminal can print, or a
whole book. Messages show it through the functions here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

MOST_NAMES = 40  # of a list of names
KINDS = {
    str: "the text ",
    list: "the list ",
    dict: "the object ",
    int: "the number ",
    float: "the number ",
    bool: "",
}


def a(value: Any) -> str:
    """What a value is, shown short: `the text 'hi'`, `nothing`."""
    kind = KINDS.get(type(value), f"the {type(value).__name__} ")
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # nested without end, or a number of thousands of digits
        shown = "…"
    return "nothing" if value is None else kind + (shown if len(shown) < 50 else shown[:46] + " …")


def shown(text: str, most: int | None = None) -> str:
    """The text with all that does not print escaped, as in a Python literal, and no longer than `most` characters."""
    plain = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return plain if most is None or len(plain) <= most else f"{plain[:most]}…"


def listed(names: Iterable[str]) -> str:
    """Names of columns or keys, each in backticks."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return (", ".join(f"`{shown(name, 40)}`" for name in names[:MOST_NAMES]) or "no columns") + more


def in_yaml(name: str) -> str:
    """The name as one writes it in a recipe: in quotes where it is not a plain word."""
    word = re.fullmatch(r"[^\W\d][\w-]*", name) and not re.fullmatch("y|n|yes|no|on|off|true|false|null", name.lower())
    return name if word else json.dumps(name, ensure_ascii=not name.isprintable())


def meant(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A did-you-mean for the end of a message, or nothing where no known word is as alike as `cutoff`, of 1."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{shown(close[0])}'?" if close else ""
