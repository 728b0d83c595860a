"""What a finder gives, and the text as finders read it."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple


class Found(NamedTuple):
    """A private value in a text."""

    start: int  # its first character
    end: int  # the one after its last
    kind: str  # as its placeholder names it: EMAIL, PHONE, CARD, IBAN, IP, ID, KEY, NAME
    value: str  # what it says, the same for all ways of writing it


# For character classes: letters of scripts that put blanks between words, digits, and what joins them. A number or an
# address that touches one goes on there; one that touches a Chinese or Thai letter does not.
LETTERS = "A-Za-z\u00aa-\u02af\u0370-\u052f"
WORD = f"0-9_{LETTERS}"

_GONE = "\0"  # stands for a character that nobody sees
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_HIDDEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
_DIGITS = [start + i for start in (0x660, 0x6F0, 0x966, 0x9E6) for i in range(10)]  # Arabic, Persian, Hindi, Bengali
_WIDE = [code for code in range(0xFF01, 0xFF5F) if chr(code) not in _DASHES]
_FOLDS: dict[int, str] = (
    dict.fromkeys(map(ord, _SPACES), " ")
    | dict.fromkeys(map(ord, _DASHES), "-")
    | dict.fromkeys(map(ord, _HIDDEN), _GONE)
    | {code: str(unicodedata.digit(chr(code))) for code in _DIGITS}
    | {code: chr(code - 0xFEE0) for code in _WIDE}
)
_FOLDED = re.compile("[" + "".join(map(re.escape, map(chr, _FOLDS))) + "]")


def folded(text: str) -> tuple[str, list[int] | None]:
    """The text in the characters that patterns look for, and where each of them stands in `text`; None: where it
    stood.

    Digits and signs of other scripts and widths, dashes and spaces are written in ASCII; what is invisible is gone.
    """
    if text.isascii() or not _FOLDED.search(text):
        return text, None
    plain = text.translate(_FOLDS)
    if _GONE not in plain:
        return plain, None
    kept = [i for i, letter in enumerate(plain) if letter != _GONE]
    return "".join(plain[i] for i in kept), kept


def digits(text: str) -> str:
    """The ASCII digits of a text."""
    return re.sub("[^0-9]", "", text)
