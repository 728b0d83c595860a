"""How near an answer comes to the one that its row has: each measure is a number from 0 to 1.

What stands before the end of a thought (`</think>`) is no part of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

from align.data.formats.references import CHOICES, REFERENCES
from align.data.prompt_set import NAMED, PromptSet
from align.recipe.errors import UserError
from align.training.borders.foreign import foreign
from align.training.mathematics import equal

Measure = Literal["exact_match", "contains", "multiple_choice", "rouge_l", "math"]
LIBRARIES = {"rouge_l": ("rouge_score", "rouge"), "math": ("math_verify", "math")}  # module, extra
EACH = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"  # letters that are words by themselves
WORD = re.compile(rf"{EACH}|(?:(?!{EACH})[^\W_])+")
LETTER = r"\(?\**([A-J])\**\)?(?![\w'])"
SAID = (  # where a choice stands in an answer, the surest first
    re.compile(rf"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*{LETTER}"),
    re.compile(rf"^\W*{LETTER}\s*(?:[.):]|$)", re.MULTILINE),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"\\boxed\{\W*([A-J])\W*\}"),
)


def check_measures(measures: Sequence[Measure], prompts: PromptSet) -> None:
    """UserError for measures whose library is missing, and for rows without an answer to compare with."""
    problems = [
        f"train.generate.measures: {name} needs {module.replace('_', '-')}; run: pip install 'align[{extra}]'"
        for name, (module, extra) in LIBRARIES.items()
        if name in measures and find_spec(module) is None
    ]
    without = [where for where, found in zip(prompts.where, prompts.references, strict=True) if found is None]
    if measures and without:
        problems.append(
            f"train.generate.measures: {len(without):,} of {len(prompts.where):,} prompts have no answer to compare "
            f"with ({', '.join(without[:NAMED])}{', …' * (len(without) > NAMED)}): give their rows a column "
            f"{', '.join(REFERENCES[:-1])} or {REFERENCES[-1]}, or an assistant's last turn"
        )
    if problems:
        raise UserError(*problems)


def measured(name: Measure, response: str, reference: str, record: dict[str, Any]) -> float:
    """One answer beside its row's; `record` is the row."""
    return MEASURES[name](response.rpartition("</think>")[2], reference, record)


def exact_match(response: str, reference: str, record: dict[str, Any]) -> float:
    """1 where both have the same words, letter by letter; how they are spaced does not count."""
    return float(response.split() == reference.split())


def contains(response: str, reference: str, record: dict[str, Any]) -> float:
    """1 where the reference stands in the response; neither case nor spacing counts."""
    said, wanted = (" ".join(text.casefold().split()) for text in (response, reference))
    return float(bool(wanted) and wanted in said)


def multiple_choice(response: str, reference: str, record: dict[str, Any]) -> float:
    """1 where the response chooses what the reference does: by letter, A to J, or by the words of one choice alone."""
    choices = next((record[name] for name in CHOICES if isinstance(record.get(name), list)), [])
    texts = [str(choice) for choice in choices]
    wanted = chosen(reference, texts)
    if wanted is None and reference.strip().isdigit():  # its place in the list, from 0 on, as MMLU has it
        wanted = int(reference)
    return float(wanted is not None and chosen(response, texts) == wanted)


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """The number of the choice that a text makes; None where that cannot be told."""
    for pattern in SAID:
        if found := pattern.search(text):
            return ord(found[1]) - ord("A")
    said = " ".join(text.casefold().split())
    named = [i for i, choice in enumerate(choices) if (words := " ".join(choice.casefold().split())) and words in said]
    return named[0] if len(named) == 1 else None


def rouge_l(response: str, reference: str, record: dict[str, Any]) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by rouge-score, without stemming.

    Its own words are runs of a-z and 0-9; here letters of all languages count, Chinese and Japanese ones each.
    """
    return float(_rouge().score(reference, response)["rougeL"].fmeasure)


def math(response: str, reference: str, record: dict[str, Any]) -> float:
    """1 where math-verify finds both to be the same number or expression."""
    return float(foreign("train.generate.measures: math-verify failed", lambda: equal(response, reference)))


MEASURES: dict[str, Callable[[str, str, dict[str, Any]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "multiple_choice": multiple_choice,
    "rouge_l": rouge_l,
    "math": math,
}
assert MEASURES.keys() == set(get_args(Measure))


class _Words:
    """rouge-score's interface of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
