"""Figures of each titled source of the held-out rows, beside those of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from align.data.examples import Examples
from align.recipe.errors import UserError
from align.recipe.source import FIGURES


def titled(examples: Examples) -> dict[str, np.ndarray]:
    """The numbers of the examples, (k,) int64, by the titles of their sources; those without a title under ""."""
    found: dict[str, list[np.ndarray]] = {}
    for part, start in zip(examples.parts, examples.starts, strict=False):
        if len(part.rows):
            found.setdefault(part.source.title or "", []).append(np.arange(start, start + len(part.rows)))
    return {title: np.concatenate(numbers) for title, numbers in found.items()}


def with_sources(figures: Mapping[str, Any], by_source: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures, and each title's as `<name>/<title>`; lists are of all rows alone.

    Raises UserError where two would have one name.
    """
    found = dict(figures)
    for title, own in by_source.items():
        for name, value in own.items():
            if isinstance(value, list):
                continue
            ending = next((ending for ending in FIGURES if name.endswith(ending)), "")
            full = f"{name.removesuffix(ending)}/{title}{ending}"
            if full in found:
                raise UserError(f"data: the title {title!r} would give two figures the name {full!r}; take another")
            found[full] = value
    return found
