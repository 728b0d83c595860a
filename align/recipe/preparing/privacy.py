"""Which private values give way to placeholders."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from align.recipe.paths import Location
from align.recipe.section import Section

Kind = Literal["KEY", "EMAIL", "IBAN", "CARD", "ID", "IP", "PHONE"]


class Privacy(Section):
    """Private values become placeholders such as `<EMAIL_1>`, one value one placeholder throughout a row. Needs
    `pip install 'align[prepare]'`."""

    kinds: list[Kind] = Field(
        default_factory=lambda: ["KEY", "EMAIL", "IBAN", "CARD", "ID", "IP", "PHONE"], min_length=1
    )
    """What is looked for: keys, tokens and passwords; e-mail addresses; bank accounts; payment cards; personal numbers
    that a state gives; IP addresses that somebody has; telephone numbers."""
    countries: list[str] | None = None
    """Countries, as ISO 3166 codes such as `[US, DE]`, whose national telephone and personal numbers are looked for.
    Default: all that are known."""
    names: Location | None = None
    """A model that finds names of persons (`<NAME_1>`): a local folder in Hugging Face format that classifies tokens,
    with a label for persons (`PER`, `B-PER`, `PERSON`, …)."""
    presidio: list[str] = Field(default_factory=list)
    """Recognisers of presidio-analyzer to run besides, by their entities such as `[CRYPTO, MEDICAL_LICENSE]`. Needs
    `pip install 'align[prepare-presidio]'`."""

    @field_validator("countries")
    @classmethod
    def _are_codes(cls, codes: list[str] | None) -> list[str] | None:
        wrong = [code for code in codes or () if not re.fullmatch("[A-Z]{2}", code)]
        if wrong or codes == []:
            raise ValueError(f"expected codes such as US or DE, found {wrong[0] if wrong else 'none'}")
        return codes

    @field_validator("presidio")
    @classmethod
    def _are_entities(cls, names: list[str]) -> list[str]:
        if wrong := [name for name in names if not re.fullmatch("[A-Z][A-Z_]*", name)]:
            raise ValueError(f"expected entities such as CRYPTO, found {wrong[0]!r}")
        return names
