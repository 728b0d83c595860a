"""Rewards that are rules (`function: align.training.rules:…` in `ppo.rewards`), and patterns for your own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from align.training.mathematics import equal

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
PRAISE = {  # valence -> words, the more common first
    1.5: "superb dazzling unforgettable masterly sublime flawless exquisite",
    1.0: "clever charming moving gripping elegant inventive graceful",
    0.5: "good pleasant decent warm neat lively tidy",
    -0.5: "weak slow thin tired uneven bland clumsy",
    -1.0: "dull silly tedious hollow lifeless muddled shallow",
    -1.5: "awful dreadful unbearable atrocious wretched abysmal insufferable",
}
VALENCES = {word: valence for valence, words in PRAISE.items() for word in words.split()}
ADVERBS = {"very": 2.0, "not": -1.0}


def one_sentence(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a single whole sentence of at most 25 words, 0 for more or less than that."""
    return [
        float(bool(re.fullmatch(r"[^.!?\n]*\w[^.!?\n]*[.!?]", response.strip())) and len(response.split()) <= 25)
        for response in responses
    ]


def exact_answer(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float | None]:
    """1 where the last number of the response is the last one of the row's `answer`, as in GSM8K (arXiv 2110.14168).

    Where `math-verify` is installed, also where it finds both equal (1/2 and 0.5, \\frac{1}{2}, sets). Of an
    answer with `####` in it, what stands behind that counts there. A row without an answer has no score. Raises
    ValueError where no row has one.
    """
    answers = [row.get("answer") for row in rows]
    if answers and answers.count(None) == len(answers):
        raise ValueError("no row has a column `answer` to compare with")
    by_mathematics = _knows_mathematics()

    def same(response: str, answer: str) -> bool:
        return _same_number(response, answer) or (by_mathematics and equal(response, answer))

    return [
        None if answer is None else float(same(response, str(answer)))
        for response, answer in zip(responses, answers, strict=True)
    ]


def sentiment(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """The sum of the `VALENCES` of a response's words, each counted where it comes first: twice right after "very",
    negated right after "not". "A very dull plot, but not awful, not awful at all." is -2 + 1.5.
    """
    return [_valence(re.findall(r"[a-z]+", response.lower())) for response in responses]


def _valence(words: list[str]) -> float:
    found: dict[str, float] = {}
    for before, word in zip(["", *words], words, strict=False):
        if word in VALENCES:
            found.setdefault(word, VALENCES[word] * ADVERBS.get(before, 1.0))
    return sum(found.values())


def _same_number(response: str, answer: str) -> bool:
    said = _last(response)
    return said is not None and said == _last(answer)


def _last(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@cache
def _knows_mathematics() -> bool:
    """Whether there is `math-verify`; that there is none is said once."""
    if find_spec("math_verify"):
        return True
    if os.environ.get("RANK", "0") == "0":
        told = "exact_answer compares numbers alone; pip install math-verify for fractions, LaTeX and expressions"
        print(told, file=sys.stderr)
    return False
