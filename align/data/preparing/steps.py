"""The steps that a recipe asks for, in their order. Row steps come first, in one pass; then what looks at all rows.

So a value that was masked does not tell two rows apart, and a row that is dropped by itself repeats none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from align.data.formats.rows import Formats
from align.data.preparing.duplicates.near import NearDuplicates
from align.data.preparing.duplicates.repeated import RepeatedParts, paragraph_spans, sentence_spans
from align.data.preparing.duplicates.same import Same, column, everything, normalised, prompt
from align.data.preparing.filters.published import C4Rules, FineWebRules, GopherQualityRules, GopherRepetitionRules
from align.data.preparing.filters.rules import Function, Length, Placeholders, Refusals, Signs, WordList
from align.data.preparing.split import Split
from align.data.preparing.step import Item, Observer, RowStep, SetStep
from align.recipe.functions import Border
from align.recipe.preparing.duplicates import Deduplicate
from align.recipe.preparing.filters import Filter
from align.recipe.preparing.preparation import Preparation
from align.recipe.schema import Source


class Plan(NamedTuple):
    """All that the steps depend on. It travels to the workers, which make the steps anew."""

    sources: Sequence[Source]
    formats: Formats
    preparation: Preparation
    seed: int
    border: Border  # around the user's own functions
    kept: Sequence[str] | None = ()  # columns of records that are written too; None: all
    shares: Mapping[str, float] = {}  # of the sides beside train

    @property
    def columns(self) -> Sequence[str] | None:
        """Columns that items carry."""
        by = self.preparation.deduplicate.by if self.preparation.deduplicate else []
        functions = self.preparation.filter.functions
        return None if self.kept is None or functions else list(dict.fromkeys([*self.kept, *by]))


class Steps(NamedTuple):
    """The steps of a plan."""

    rows: list[RowStep]
    sets: list[SetStep]
    observers: list[Observer]
    hide: Callable[[str], str]  # what a report may say of a text


def steps_of(plan: Plan) -> Steps:
    """Make every step. Raises UserError with what is missing."""
    preparation = plan.preparation
    rows = [*filters(preparation.filter, plan.border)]
    sets = [*duplicates(preparation.deduplicate, plan.seed)] if preparation.deduplicate else []
    if plan.shares:
        sets.append(Split(plan.shares, plan.seed))
    return Steps(rows, sets, [], str)


def filters(section: Filter, border: Border) -> list[RowStep]:
    """The filters that look at each row by itself, the cheap ones first."""
    bounds = (section.min_characters, section.max_characters, section.min_words, section.max_words, section.max_turns)
    found: list[RowStep] = []
    if any(bound is not None for bound in bounds):
        found.append(Length(section))
    if section.max_symbols is not None or section.max_digits is not None:
        found.append(Signs(section))
    if section.placeholders:
        found.append(Placeholders())
    if section.refusals:
        found.append(Refusals())
    found += [WordList(words, f"filter.words.{i}") for i, words in enumerate(section.words)]
    for rules, make in (
        (section.gopher_quality, GopherQualityRules),
        (section.gopher_repetition, GopherRepetitionRules),
        (section.c4, C4Rules),
        (section.fineweb, FineWebRules),
    ):
        if rules is not None:
            found.append(make(rules))
    found += [Function(name, f"filter.functions.{i}", border) for i, name in enumerate(section.functions)]
    return found


def duplicates(section: Deduplicate, seed: int) -> list[SetStep]:
    """What finds rows that repeat others, the surest first."""

    def same(name: str, key: Callable[[Item], object], reason: str) -> Same:
        return Same(f"deduplicate.{name}", key, reason, section.drop)

    found: list[SetStep] = []
    if section.exact == "same":
        found.append(same("exact", partial(_of_row, everything), "the same as an earlier row"))
    elif section.exact == "normalised":
        reason = "the same as an earlier row but for case, punctuation and blanks"
        found.append(same("exact", partial(_of_row, normalised), reason))
    for name in section.by:
        found.append(same(f"by.{name}", column(name), f"the same {name} as an earlier row"))
    if section.prompts:
        found.append(same("prompts", prompt, "the same prompt as an earlier row"))
    if section.near:
        found.append(NearDuplicates(section.near, seed, section.drop))
    for what, repeated, spans in (
        ("paragraphs", section.paragraphs, paragraph_spans),
        ("sentences", section.sentences, sentence_spans),
    ):
        if repeated:
            found.append(RepeatedParts(f"deduplicate.{what}", what, repeated, spans))
    return found


def _of_row(key: Callable, item: Item) -> str:
    return key(item.row)
