"""The answers to held-out prompts in the run's report: before training and after, with their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from align.training.report.panels import records
from align.training.report.plots import pages

SHOWN = 20  # prompts


class Answer(NamedTuple):
    """What was said, and what that is worth."""

    response: str
    scores: dict[str, float | None]


class Answered(NamedTuple):
    """A prompt with its answers, each under a heading."""

    prompt: str
    reference: str | None
    answers: list[tuple[str, Answer]]


def answers_section(path: Path) -> Markup:
    """Nothing for a run without answers.jsonl."""
    shown, total = answers(path)
    if not shown:
        return Markup()
    return Markup(pages().get_template("answers.html.jinja").render(shown=shown, total=total))


def answers(path: Path) -> tuple[list[Answered], int]:
    """The first prompts with their first and last answers, and how many prompts there are."""
    rows = [row for row in records(path) if row and _is_answer(row)]
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return [], 0
    ends = [("Before training" if steps[0] == 0 else f"Step {steps[0]}", steps[0])]
    ends += [(f"After step {steps[-1]}", steps[-1])] if steps[1:] else []
    found = {(row["prompt"], row["step"]): row for row in rows}
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    shown = []
    for prompt in prompts[:SHOWN]:
        own = [(heading, found[prompt, step]) for heading, step in ends if (prompt, step) in found]
        reference = next((row["reference"] for _, row in own if isinstance(row.get("reference"), str)), None)
        shown.append(Answered(prompt, reference, [(heading, _answer(row)) for heading, row in own]))
    return shown, len(prompts)


def _is_answer(row: dict[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("prompt"), str) and not row.get("sample")


def _answer(row: dict[str, Any]) -> Answer:
    scores = row.get("scores")
    known = scores if isinstance(scores, dict) else {}
    numbers = {str(k): v for k, v in known.items() if v is None or type(v) in (int, float)}
    return Answer(str(row.get("response", "")), numbers)
