"""The steps that a recipe asks for, in their order. Row steps come first, in one pass; then what looks at all rows.

So a value that was masked does not tell two rows apart, and a row that is dropped by itself repeats none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from align.data.formats.rows import Formats, Row
from align.data.preparing.card.card import Card
from align.data.preparing.decontamination import Decontaminate, Index, items_of
from align.data.preparing.duplicates.near import NearDuplicates
from align.data.preparing.duplicates.repeated import RepeatedParts, paragraph_spans, sentence_spans
from align.data.preparing.duplicates.same import Same, column, everything, normalised, prompt
from align.data.preparing.filters.published import C4Rules, FineWebRules, GopherQualityRules, GopherRepetitionRules
from align.data.preparing.filters.rules import Function, Languages, Length, Placeholders, Refusals, Signs, WordList
from align.data.preparing.mixing import Mixing
from align.data.preparing.privacy import Names, Privacy
from align.data.preparing.split import Split
from align.data.preparing.step import Item, Observer, RowStep, SetStep
from align.data.preparing.tokens import words_in
from align.recipe.errors import UserError
from align.recipe.functions import Border
from align.recipe.preparing.duplicates import Deduplicate
from align.recipe.preparing.filters import Filter
from align.recipe.preparing.mixing import Mix
from align.recipe.preparing.preparation import Preparation
from align.recipe.preparing.privacy import Privacy as PrivacySection
from align.recipe.source import Source


class Tools(NamedTuple):
    """What steps need from floors above: functions that each worker calls, so they have to be importable there."""

    border: Border  # around the user's own functions
    names: Callable[[PrivacySection], Names] | None = None  # makes what finds names of persons
    tokens: Callable[[], Callable[[Row], int]] | None = None  # makes what counts a row's tokens; words count without


class Plan(NamedTuple):
    """All that the steps depend on. It travels to the workers, which make the steps anew."""

    sources: Sequence[Source]
    formats: Formats
    preparation: Preparation
    seed: int
    tools: Tools
    kept: Sequence[str] | None = ()  # columns of records that are written too; None: all
    shares: Mapping[str, float] = {}  # of the sides beside train
    mix: Mix | None = None
    card: bool = False  # whether rows are counted as they are read and written

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
    hide: Callable[[str, Item | None], str]  # what a report may say of a text that comes from an item


def steps_of(plan: Plan) -> Steps:
    """Make every step. Raises UserError with what is missing."""
    preparation, tools = plan.preparation, plan.tools
    rows, sets, private = filters(preparation.filter, tools.border), list[SetStep](), None
    if section := preparation.decontaminate:
        index = Index(items_of(section.against), section.ngram)
        rows.append(Decontaminate(index, section.threshold))
    if section := preparation.privacy:
        private = privacy(section, tools)
        rows.append(private)
    if preparation.deduplicate:
        sets += duplicates(preparation.deduplicate, plan.seed)
    if plan.shares:
        sets.append(Split(plan.shares, plan.seed))
    sources, tokens = [source.path for source in plan.sources], tools.tokens and tools.tokens()
    if plan.mix:
        if plan.mix.by == "tokens" and tokens is None:
            raise UserError("mix.by: tokens are counted by a tokenizer: name one with `tokenizer`, or mix by rows")
        sets.append(Mixing(plan.mix, sources, tokens or words_in, plan.seed))
    hide = private.hide if private else _as_it_is
    return Steps(rows, sets, [Card(sources, tokens, private)] if plan.card else [], hide)


def privacy(section: PrivacySection, tools: Tools) -> Privacy:
    """The step that masks private values. Raises UserError where names are to be found and nothing can."""
    wanted = section.names or section.presidio
    if wanted and tools.names is None:
        raise UserError("privacy.names and privacy.presidio need a model: prepare the set with align.prepare first")
    names = tools.names(section) if wanted else None
    return Privacy(section.kinds, section.countries, names)


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
    if section.languages:
        found.append(Languages(section.languages, section.min_language_score))
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
        reason = f"the same {name} as an earlier row"
        found.append(Same(f"deduplicate.by.{name}", column(name), reason, section.drop, raw=True))
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


def _as_it_is(text: str, item: Item | None) -> str:
    return text
