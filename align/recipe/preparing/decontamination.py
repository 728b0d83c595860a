"""Which test sets rows may not hold items of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from align.recipe.section import PositiveInt, Section
from align.recipe.source import Source


class Decontaminate(Section):
    """Rows that hold an item of a test set go: word n-grams that both have are counted, over all texts of a row."""

    against: list[Source] = Field(min_length=1)
    """The test sets. An item is what a row asks: its prompt, or its text where it has no turns."""
    ngram: PositiveInt = 6
    """Words of an n-gram. Case, punctuation and blanks do not count; in scripts without blanks, a word is a letter."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of an item's words that stand in n-grams which the row has too. 1: all of them."""
