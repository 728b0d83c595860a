"""Which rows repeat others, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.section import PositiveInt, Section


class Near(Section):
    """Near-duplicates, by MinHash (Broder 1997) and locality-sensitive hashing: rows are compared by the word n-grams
    that they share. Needs `pip install 'align[prepare]'`."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Least Jaccard similarity of two near-duplicates: n-grams that both have over n-grams that either has."""
    ngram: PositiveInt = 3
    """Words of an n-gram. Case, punctuation and blanks do not count; in scripts without blanks, a word is a letter."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Numbers in a row's signature. The similarity is estimated to about 1 / (2 sqrt(permutations))."""
    min_words: PositiveInt = 5
    """Shorter rows are left to `exact`: few n-grams say little."""


class Repeated(Section):
    """Parts of texts that stood in an earlier text are taken out. Rows with turns or labels are left alone."""

    min_words: PositiveInt = 5
    """Shorter parts may repeat."""
    span: PositiveInt = 1
    """So many in a row are compared as one: C4 takes spans of 3 sentences (Raffel et al. 2020)."""


class Deduplicate(Section):
    """Of rows that are the same, the first in the order of the sources stays."""

    exact: Literal["off", "same", "normalised"] = "normalised"
    """`same`: rows that hold exactly the same. `normalised`: also those that differ in case, punctuation, blanks or the
    form of their Unicode alone."""
    by: list[str] = Field(default_factory=list)
    """Columns such as `[url, id]`: rows with the same value in one of them are the same. A row without it is not."""
    prompts: bool = False
    """Rows with answers: of those with the same prompt, only the first stays."""
    sentences: Repeated | None = None
    """Take out sentences that stood in an earlier text."""
    paragraphs: Repeated | None = None
    """Take out paragraphs that stood in an earlier text."""
    near: Near | None = None
    drop: bool = True
    """Drop rows that repeat an earlier one. False only counts them, and keeps them on one side of the split."""

    @model_validator(mode="after")
    def _are_columns(self) -> Deduplicate:
        if not all(name.strip() for name in self.by) or len(set(self.by)) < len(self.by):
            raise ValueError("`by` names columns, each once")
        return self
