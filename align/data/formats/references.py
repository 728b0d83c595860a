"""Prompts with the answer that their row has, if it has one: what a response is compared with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from align.data.formats.answers import COMPARED, answer_turns, prompt_turns
from align.data.formats.formats import FORMATS
from align.data.formats.prompts import PROMPTING, prompt_row
from align.data.formats.rows import Formats, Refused, Row
from align.data.formats.verdicts import LABELS, verdict

REFERENCES = ("answer", "completion", "output", "chosen")  # columns, the first that says something counts
CHOICES = ("choices", "options")  # of which one is the answer, in rows that ask for one


def reference(row: dict[str, Any]) -> str | None:
    """The answer that the row has: of these columns, else its last turn if that is the assistant's.

    None where there is none, or where the row's label calls it a bad one.
    """
    with suppress(Refused):  # a label that is no verdict says nothing of the answer
        if verdict(row) is False:
            return None
    for name in REFERENCES:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        with suppress(Refused):
            turns = answer_turns(name, value) if value else []
            if turns and turns[-1].message["role"] == "assistant":
                return turns[-1].message["content"]
    turns = prompt_turns(row)
    return turns[-1].message["content"] if turns and turns[-1].message["role"] == "assistant" else None


def _answerable(row: dict[str, Any]) -> Row:
    """The prompt; its one answer is the reference."""
    found = reference(row)
    return prompt_row(row)._replace(answers=() if found is None else ({"role": "assistant", "content": found},))


_COLUMNS = {name for shape in (*FORMATS.values(), *COMPARED.values()) for name in (*shape.needs, *shape.may)}
ANSWERABLE: Formats = {
    "transcripts": COMPARED["transcripts"],
    "ranked": COMPARED["ranked"],
    "prompts": PROMPTING["prompts"]._replace(
        read=_answerable, may=tuple(sorted({*_COLUMNS, *REFERENCES, *CHOICES, *LABELS}))
    ),
    "pairs": COMPARED["pairs"],
    "text": FORMATS["text"],
}
