"""How much of each source the written set holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from align.recipe.section import PositiveInt, Section


class Mix(Section):
    """Shares of the sources, and how large the whole is. Which rows come once more than others is a seeded choice."""

    by: Literal["tokens", "rows"] = "tokens"
    """What is counted: tokens of the recipe's tokenizer, or rows."""
    weights: list[Annotated[float, Field(ge=0)]] | None = None
    """The shares that are wanted, one a source in their order: `[3, 1]`. Default: the sources' sizes."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Shares are raised to 1 / temperature: above 1, small sources come more often than their weights say."""
    epochs: list[Annotated[float, Field(gt=0)]] | Annotated[float, Field(gt=0)] = 1.0
    """Most passes over a source: one number for all, or one a source. Up to 4, repeated tokens are worth nearly as much
    as new ones (Muennighoff et al. 2023, arXiv 2305.16264)."""
    caps: list[PositiveInt | None] | None = None
    """Most tokens or rows, as `by` says, of each source; null for no cap."""
    total: PositiveInt | None = None
    """Tokens or rows, as `by` says, of the whole. A source that has not enough gives all it may, and the others make up
    for it. Default: as many as there can be at exactly the shares that are wanted."""

    @field_validator("weights")
    @classmethod
    def _weigh(cls, weights: list[float] | None) -> list[float] | None:
        if weights is not None and not any(weights):
            raise ValueError("one weight must be above 0")
        return weights
