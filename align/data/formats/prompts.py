"""Prompts to be answered: each row as the stem that a response will continue; and the row itself, for rewards that
read it.

A prompt is a conversation up to the turn that is to be written (an answer that the row has is left out), or the
beginning of a text. It ends as the chat template opens the assistant's turn, so a response's tokens follow at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.examples import Examples
from align.data.formats.answers import COMPARED, PROMPTS, prompt_turns
from align.data.formats.formats import FORMATS, read_records
from align.data.formats.message import said
from align.data.formats.reading import Reading
from align.data.formats.rows import Fault, Formats, Refused, Row, Shape
from align.data.formats.turns import check, remarks_of, settled, tools_of
from align.data.formats.values import encodable
from align.data.templates.chat import Unwritable
from align.data.templates.chats import chat_of
from align.data.templates.control import controls_of
from align.data.templates.render import Written, tokenised
from align.data.trees import Tree

ANSWER = {"role": "assistant", "content": "a"}  # stands in for the one to come


class Asked(NamedTuple):
    """A prompt's row, as a reward sees it."""

    record: dict[str, Any]  # as the file has it
    messages: list[dict[str, Any]] | None  # the conversation up to the answer, or
    text: str | None  # the beginning of a text


def prompts() -> Reading:
    """Whatever asks for an answer: a tree of a stem alone, without labels."""
    return Reading("prompts", PROMPTING, _render)


def asked(examples: Examples) -> list[Asked]:
    """The rows of all examples, read again from their files."""
    rows: list[Asked | None] = []
    for part in examples.parts:
        places = {part.store.place(row): i for i, row in enumerate(part.rows, len(rows))}
        rows += [None] * len(places)
        for record, row in part.left.records() if part.left else read_records(part.source, PROMPTING):
            i = places.get((row.file, row.line))
            if i is not None and isinstance(row, Row):
                rows[i] = Asked(record, row.messages, row.text)
    assert None not in rows, "every example came from a row"
    return rows


def prompt_row(row: dict[str, Any]) -> Row:
    """The conversation up to the turn that is to be written."""
    turns, repairs = settled(prompt_turns(row))
    if turns and turns[-1].message["role"] == "assistant":
        turns = turns[:-1]  # the answer to be
    if all(turn.message["role"] == "system" for turn in turns):
        raise Refused(f"prompt: expected one of the columns {', '.join(PROMPTS)}, found none with a prompt in it")
    check([*turns, said("assistant", turns[-1].content_at, "a")])
    messages = encodable("messages", [turn.message for turn in turns])
    tools = encodable("tools", tools_of(row.get("tools")))
    return Row("", 0, messages, None, tools, repairs, remarks=remarks_of(turns))


def _without_answers(read: Any, row: dict[str, Any]) -> Row:
    return read(row)._replace(answers=(), targets=())


_CONTEXT = ("system", "tools", "input", "history")
_NOTE = "; its answers are left out"
PROMPTING: Formats = {
    "transcripts": COMPARED["transcripts"]._replace(
        read=partial(_without_answers, COMPARED["transcripts"].read), note=_NOTE
    ),
    "prompts": Shape((), _CONTEXT, (), prompt_row, either=PROMPTS, also={"question": "prompt"}),
    "pairs": COMPARED["pairs"]._replace(read=partial(_without_answers, COMPARED["pairs"].read), note=_NOTE),
    "text": FORMATS["text"],
}


def written(row: Row, tokenizer: PreTrainedTokenizerBase) -> Written:
    """A row as text, up to where its answer begins. Raises Unwritable."""
    controls = controls_of(tokenizer)
    if row.messages is None:
        text = controls.words(row, row.text)
    else:
        last = sum(message["role"] == "assistant" for message in row.messages)
        messages, tools = controls.words(row, row.messages), controls.words(row, row.tools)
        text, (turn,) = chat_of(tokenizer).turns([*messages, ANSWER], tools, {last})
        text = text[: turn.begin]
    return text, [], controls.notes(text)


def stems(rows: list[tuple[Row, Written]], tokenizer: PreTrainedTokenizerBase) -> list[Tree | Fault]:
    """The tokens of rows that were written."""
    controls = controls_of(tokenizer)
    chats = iter(tokenised([each for row, each in rows if row.messages is not None], controls))
    texts = iter(controls.encode([text for row, (text, *_) in rows if row.messages is None], add_special_tokens=True))
    return [
        _stem(row, next(chats)[0] if row.messages else _beginning(next(texts).ids, tokenizer), notes)
        for row, (*_, notes) in rows
    ]


def _render(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Tree | Fault]:
    found: list[Written | Fault] = []
    for row in rows:
        try:
            found.append(written(row, tokenizer))
        except Unwritable as error:
            found.append(Fault(row.file, row.line, str(error)))
    usable = [(row, each) for row, each in zip(rows, found, strict=True) if not isinstance(each, Fault)]
    trees = iter(stems(usable, tokenizer))
    return [each if isinstance(each, Fault) else next(trees) for each in found]


def _beginning(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Without an end-of-text token that the tokenizer adds by itself."""
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids


def _stem(row: Row, ids: np.ndarray, notes: tuple[str, ...]) -> Tree | Fault:
    if not len(ids):
        return Fault(row.file, row.line, "no token in the prompt, to go on from")
    return Tree((ids,), (np.zeros(len(ids), bool),), (0.0,), notes=notes)
