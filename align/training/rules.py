"""Rewards that are rules, for `ppo.rewards` with `function: align.training.rules:…`, and patterns for your own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def one_sentence(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a single whole sentence of at most 25 words, 0 for more or less than that."""
    return [
        float(bool(re.fullmatch(r"[^.!?\n]*\w[^.!?\n]*[.!?]", response.strip())) and len(response.split()) <= 25)
        for response in responses
    ]


def exact_answer(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 where the last number of the response is the last one of the row's `answer`, as in GSM8K (arXiv 2110.14168)."""
    return [
        float((said := _last(response)) is not None and said == _last(str(row.get("answer", ""))))
        for response, row in zip(responses, rows, strict=True)
    ]


def _last(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
