"""Prompts with the answer that their row has, if it has one: what a response is compared with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from align.data.formats.answers import COMPARED, answer_turns, prompt_turns
from align.data.formats.formats import FORMATS
from align.data.formats.prompts import PROMPTING, prompt_row
from align.data.formats.rows import Fault, Formats, Refused, Row
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


def answerable(record: dict[str, Any], row: Row) -> Row | Fault:
    """A row of any stage as its prompt; its one answer is the reference. `record`: its columns."""
    if row.messages is None:
        return row
    before, last = (row.messages, row.answers[0]) if row.answers else (row.messages[:-1], row.messages[-1])
    if last["role"] != "assistant":
        before, last = row.messages, None
    if all(message["role"] == "system" for message in before):
        return Fault(row.file, row.line, "nothing is asked before the answer")
    bad = bool(row.targets) and row.targets[0] < 0.5 and len(row.answers) == 1  # of a row with a verdict
    found = None if bad or last is None else last["content"]
    with suppress(Refused):
        found = reference(record) or found
    return row._replace(messages=before, answers=_said(found), targets=())


def _answerable(row: dict[str, Any]) -> Row:
    """The prompt of a record; its one answer is the reference."""
    return prompt_row(row)._replace(answers=_said(reference(row)))


def _said(answer: str | None) -> tuple[dict[str, Any], ...]:
    return () if answer is None else ({"role": "assistant", "content": answer},)


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
