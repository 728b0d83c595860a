"""What becomes of rows before they are tokens: the section that `align.prepare` and the stages share."""

from __future__ import annotations

from pydantic import Field

from align.recipe.preparing.decontamination import Decontaminate
from align.recipe.preparing.duplicates import Deduplicate
from align.recipe.preparing.filters import Filter
from align.recipe.preparing.privacy import Privacy
from align.recipe.section import Section


class Preparation(Section):
    """Steps in this order: what looks at each row by itself, then what looks at all rows."""

    filter: Filter = Field(default_factory=Filter)
    decontaminate: Decontaminate | None = None
    privacy: Privacy | None = None
    deduplicate: Deduplicate | None = None
