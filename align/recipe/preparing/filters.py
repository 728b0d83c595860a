"""Which rows are dropped for what stands in them: published rules, rules of one's own, models and functions.

The published rules were made for web pages in English. A row is measured as one text: all its turns and answers, parted
by blank lines. A rule that is null is off.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from align.recipe.paths import Location
from align.recipe.section import PositiveInt, Section

Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class GopherQuality(Section):
    """Gopher's rules of quality (Rae et al. 2021, arXiv 2112.11446, A.1.1), with its thresholds."""

    min_words: PositiveInt | None = 50
    """Fewest words."""
    max_words: PositiveInt | None = 100_000
    """Most words."""
    min_word_length: Positive | None = 3
    """Least mean length of words, in characters."""
    max_word_length: Positive | None = 10
    """Greatest mean length of words, in characters."""
    max_symbol_ratio: Positive | None = 0.1
    """Most `#` for each word, and most ellipses for each word."""
    max_bullet_lines: Ratio | None = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_lines: Ratio | None = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: Ratio | None = 0.8
    """Least share of words with a letter."""
    min_stop_words: PositiveInt | None = 2
    """Fewest stop words, each occurrence counted."""
    stop_words: list[str] = Field(default_factory=lambda: ["the", "be", "to", "of", "and", "that", "have", "with"])
    """The words that count as stop words. The default is English."""


class GopherRepetition(Section):
    """Gopher's rules on repetition (the same paper, table A1): shares of a text that repeat what stands before."""

    max_duplicate_lines: Ratio | None = 0.3
    """Share of lines."""
    max_duplicate_paragraphs: Ratio | None = 0.3
    """Share of paragraphs."""
    max_duplicate_line_characters: Ratio | None = 0.2
    """Share of characters in such lines."""
    max_duplicate_paragraph_characters: Ratio | None = 0.2
    """Share of characters in such paragraphs."""
    max_top_ngrams: dict[str, Ratio] = Field(default_factory=lambda: {"2": 0.2, "3": 0.18, "4": 0.16})
    """Length in words -> share of characters in the most frequent n-gram of that length, if it repeats."""
    max_duplicate_ngrams: dict[str, Ratio] = Field(
        default_factory=lambda: {"5": 0.15, "6": 0.14, "7": 0.13, "8": 0.12, "9": 0.11, "10": 0.1}
    )
    """Length in words -> share of characters in n-grams of that length that repeat earlier ones."""

    @field_validator("max_top_ngrams", "max_duplicate_ngrams")
    @classmethod
    def _are_lengths(cls, limits: dict[str, float]) -> dict[str, float]:
        if wrong := [n for n in limits if not re.fullmatch("[1-9][0-9]?", n)]:
            raise ValueError(f"expected a length in words from 1 to 99, found {wrong[0]!r}")
        return limits


class C4(Section):
    """C4's rules (Raffel et al. 2020, JMLR 21:140, section 2.2). They take lines out of texts; rows with turns are not
    cut, only dropped where a rule speaks of the whole."""

    min_sentences: PositiveInt | None = 5
    """Fewest sentences, after lines are taken out."""
    min_line_words: PositiveInt | None = 3
    """Lines with fewer words go."""
    max_word_characters: PositiveInt | None = 1000
    """Lines with a longer word go."""
    terminal_punctuation: bool = True
    """Lines that do not end with a full stop, a question mark, an exclamation mark or a quotation mark go."""
    javascript: bool = True
    """Lines with the word javascript go."""
    policies: bool = True
    """Lines about cookies, privacy policies and terms of use go."""
    lorem_ipsum: bool = True
    """Texts with lorem ipsum are dropped."""
    curly_brackets: bool = True
    """Texts with an opening curly bracket are dropped: most are code."""


class FineWeb(Section):
    """FineWeb's rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6)."""

    min_punctuated_lines: Ratio | None = 0.12
    """A text is dropped where no more than this share of lines ends with punctuation."""
    max_short_lines: Ratio | None = 0.67
    """A text is dropped where this share of lines, or more, is short."""
    short_line: PositiveInt = 30
    """Most characters of a short line."""
    max_duplicate_characters: Ratio | None = 0.01
    """A text is dropped where this share of characters, or more, stands in lines that stand there before."""
    max_line_breaks: Positive | None = 0.3
    """Most line breaks for each word."""


class Perplexity(Section):
    """The perplexity of a row under a causal language model, over all its tokens: exp of the mean negative
    log-likelihood a token, as CCNet has it (Wenzek et al. 2020, arXiv 1911.00359)."""

    model: Location
    """A local folder in Hugging Face format, a hub id, or `demo/smollm2-135m`."""
    min: Positive | None = None
    """Rows below go."""
    max: Positive | None = None
    """Rows above go."""
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of the rows, those with the lowest perplexity."""
    max_length: PositiveInt = 512
    """Tokens of a row that are read, from its beginning."""

    @model_validator(mode="after")
    def _says_something(self) -> Perplexity:
        if self.min is None and self.max is None and self.keep is None:
            raise ValueError("give `min`, `max` or `keep`")
        return self


class Score(Section):
    """The probability of a class under a classifier that `align.classify` has trained."""

    classifier: Location
    """`final/` folder of its run."""
    label: str
    """The class."""
    min: Ratio | None = None
    """Rows in which it is less likely go."""
    max: Ratio | None = None
    """Rows in which it is likelier go."""
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of the rows, those in which it is likeliest."""
    on: Literal["all", "answers"] = "all"
    """What is read of a row: the whole, or what the assistant says in it."""

    @model_validator(mode="after")
    def _says_something(self) -> Score:
        if self.min is None and self.max is None and self.keep is None:
            raise ValueError("give `min`, `max` or `keep`")
        return self


class Words(Section):
    """A list of words or phrases of one's own. Case does not count, and a word is not found inside another."""

    words: list[str] = Field(default_factory=list)
    """The words."""
    file: Location | None = None
    """A text file with a word or phrase a line."""
    max: Annotated[int, Field(ge=0)] = 0
    """A row with more of them goes."""
    name: str = "words"
    """What the list is called in the report."""

    @model_validator(mode="after")
    def _has_words(self) -> Words:
        if not any(word.strip() for word in self.words) and self.file is None:
            raise ValueError("give `words` or a `file` of words")
        return self


FunctionName = Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]


class Filter(Section):
    """What drops rows, in this order. Each rule counts what it takes."""

    min_characters: PositiveInt | None = None
    """Fewest characters of a row."""
    max_characters: PositiveInt | None = None
    """Most characters of a row."""
    min_words: PositiveInt | None = None
    """Fewest words of a row. In languages that write without spaces, each character counts as one."""
    max_words: PositiveInt | None = None
    """Most words of a row."""
    max_turns: PositiveInt | None = None
    """Most turns of a conversation, answers to compare not counted."""
    languages: list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]] = Field(default_factory=list)
    """Languages that rows may be in, as ISO codes: `[en, de]`. Default: all. Needs `pip install 'align[prepare]'`."""
    min_language_score: Ratio = 0.5
    """Least probability of the language that a row is taken to be in."""
    max_symbols: Ratio | None = None
    """Largest share of characters that are neither letters, digits, marks nor blanks."""
    max_digits: Ratio | None = None
    """Largest share of characters that are digits."""
    placeholders: bool = False
    """Drop rows with placeholders of templates that were never filled, such as `{{name}}` or `[INSERT NAME]`."""
    refusals: bool = False
    """Drop rows in which the assistant refuses: `I'm sorry, but I cannot …`, `As an AI language model …`."""
    words: list[Words] = Field(default_factory=list)
    """Lists of words that rows may not hold."""
    gopher_quality: GopherQuality | None = None
    gopher_repetition: GopherRepetition | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    functions: list[FunctionName] = Field(default_factory=list)
    """Functions of one's own, `package.module:function`. Each is called as function(row), with a dict of the row's
    `messages` or `text`, `answers`, `label` and `record`. It returns true to keep the row, or false, or why it goes."""
    perplexity: Perplexity | None = None
    scores: list[Score] = Field(default_factory=list)
    """Classifiers whose judgement counts, such as of quality or toxicity."""
