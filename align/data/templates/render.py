"""Rows become token trees: the text as the chat template writes it, tokenised once, with the tokens to learn
marked.
"""

from __future__ import annotations

import json
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.formats.answers import BEST
from align.data.formats.formats import FORMATS, Fault, Row
from align.data.formats.reading import Reading
from align.data.templates.chat import Chat, Span, Spoken, Unwritable
from align.data.templates.chats import chat_of
from align.data.templates.control import Controls, controls_of
from align.data.trees import Tree

LossOn = Literal["assistant", "last", "all"]


def conversations(loss_on: LossOn, empty_thoughts: bool = False) -> Reading:
    """Conversations and text, and the best answers of preferences, learnt as `render_rows` says."""
    name = f"conversations, {loss_on}" + ", empty thoughts" * empty_thoughts
    render = partial(render_rows, loss_on=loss_on, empty_thoughts=empty_thoughts)
    return Reading(name, {**BEST, **FORMATS}, render, chunks=True)


def render_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, empty_thoughts: bool = False
) -> list[Tree | Fault]:
    """Each row as a tree of one segment, or why it cannot be one.

    `assistant` trains every assistant turn from its first token to its end-of-turn token, `last` only the
    last one, `all` every token but a row's first. Turns with `train: False` are never trained, nor are turns whose
    thoughts the template leaves out; and of a thought without a word that the template writes itself nothing, unless
    `empty_thoughts`. What the template writes after the last end of turn is left off. A text row ends with the
    end-of-text token and is trained whole. Masks come from places in the text, so pad == eos changes nothing.

    Raises UserError for a tokenizer without offsets (a slow one).
    """
    controls = controls_of(tokenizer)
    chat = chat_of(tokenizer) if any(row.messages is not None for row in rows) else None
    rendered: list[Tree | Fault | None] = []
    written: list[Written] = []
    texts: list[str] = []
    for row in rows:
        try:
            if row.messages is None:
                texts.append(controls.words(row, row.text))
            else:
                written.append(_written(row, chat, controls, loss_on, empty_thoughts))
            rendered.append(None)
        except Unwritable as error:
            rendered.append(Fault(row.file, row.line, str(error)))
    chats, plain = iter(tokenised(written, controls)), iter(controls.encode(texts, add_special_tokens=True))
    notes = iter([note for _, _, note in written])
    for i, row in enumerate(rows):
        if rendered[i] is None and row.messages is None:
            ids = _ended(next(plain).ids, tokenizer.eos_token_id)
            rendered[i] = _tree(row, ids, np.ones(len(ids), bool), controls.notes(controls.words(row, row.text)))
        elif rendered[i] is None:
            rendered[i] = _tree(row, *next(chats), next(notes))
    return rendered


Written = tuple[str, list[Span], tuple[str, ...]]  # a text, the spans of it to be trained, what to say of it


def tokenised(written: list[Written], controls: Controls) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text, written by a chat template, as tokens (n,) int32 and which of them its spans train (n,) bool.

    Raises UserError for a tokenizer without offsets (a slow one).
    """
    encoded = controls.encode([text for text, *_ in written], add_special_tokens=False)  # the template has written them
    return [(ids, _covered(offsets, spans)) for (ids, offsets), (_, spans, _) in zip(encoded, written, strict=True)]


def render(row: Row, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Tree | Fault:
    """One row; `render_rows` says how."""
    return render_rows([row], tokenizer, loss_on)[0]


def prompt_key(row: Row) -> bytes:
    """8 bytes that rows with the same prompt share: all before the first assistant turn, or the whole text.

    Whitespace does not count. Where nothing stands before the first assistant turn, the whole conversation
    counts.
    """
    if row.messages is None:
        return _hash(" ".join(row.text.split()))
    first = next((i for i, message in enumerate(row.messages) if message["role"] == "assistant"), None)
    prompt = [[message["role"], *message["content"].split()] for message in row.messages[: first or None]]
    return _hash(json.dumps([prompt, row.tools]))


def left_out(turns: dict[int, Spoken]) -> tuple[str, ...]:
    """What to say of assistant turns, by their number, that the template did not write whole."""
    return tuple(
        f"assistant turn {i + 1} is context, not learnt: the chat template leaves out its {turn.lost}"
        for i, turn in turns.items()
        if turn.lost
    )


def _ended(ids: np.ndarray, eos: int | None) -> np.ndarray:
    """A text's tokens, the end-of-text token last."""
    return ids if eos is None or ids[-1:].tolist() == [eos] else np.append(ids, np.int32(eos))


def _written(row: Row, chat: Chat, controls: Controls, loss_on: LossOn, empty_thoughts: bool) -> Written:
    """The conversation's text and the spans of it to be trained. Raises Unwritable."""
    said = [message for message in row.messages if message["role"] == "assistant"]
    last = len(said) - 1
    context = {i for i, message in enumerate(said) if message.get("train") is False}
    taught = set(range(len(said))) - context
    if loss_on == "last":
        taught &= {last}
    if not taught:
        which = "the last assistant turn is" if loss_on == "last" and said else "there is no assistant turn but"
        raise Unwritable(f"no trained token: {which} context only")
    for i in sorted(taught):
        if not (said[i]["content"].strip() or said[i].get("tool_calls")):
            raise Unwritable(f"no trained token in assistant turn {i + 1}: it is empty")
    wanted = sorted(taught if loss_on != "all" else taught | context | {last})
    messages, tools = controls.words(row, row.messages), controls.words(row, row.tools)
    text, spoken = chat.turns(messages, tools, set(wanted))
    turns = dict(zip(wanted, spoken, strict=True))
    notes = left_out({i: turns[i] for i in taught}) + controls.notes(text)
    whole = {i: turn for i, turn in turns.items() if i in taught and not turn.lost}
    if not whole:
        lost = next(turn.lost for turn in turns.values() if turn.lost)
        raise Unwritable(
            f"the chat template leaves out the {lost} of every assistant turn that is to be learnt; give one that "
            "keeps them in model.chat_template, or take them out of the row"
        )
    if loss_on != "all":
        return text, [(turn.begin if empty_thoughts else turn.own, turn.end) for turn in whole.values()], notes
    untaught = [(turn.begin, turn.end) for i, turn in sorted(turns.items()) if i not in whole]
    edges = [0, *(edge for span in untaught for edge in span), turns[last].end]
    return text, [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end], notes


def _covered(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """(n, 2) places of tokens in the text -> (n,) bool, True from the first to the last token that a span
    touches.

    Tokens of one multi-byte character share its place, and some tokenizers give blanks an empty one: so whole
    runs.
    """
    covered = np.zeros(len(offsets), bool)
    begins, ends = offsets.T
    for begin, end in spans:
        covered[np.searchsorted(ends, begin, side="right") : np.searchsorted(begins, end, side="left")] = True
    return covered


def _tree(row: Row, ids: np.ndarray, trained: np.ndarray, notes: tuple[str, ...]) -> Tree | Fault:
    trained[:1] = False  # nothing stands before it to predict it from
    if not trained.any():
        return Fault(row.file, row.line, "no trained token: too short, as nothing predicts a row's first token")
    end = int(np.flatnonzero(trained)[-1]) + 1
    return Tree((ids[:end],), (trained[:end],), notes=notes)


def _hash(text: Any) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
