"""Rows become token trees: the text as the chat template writes it, tokenised once, with the tokens to learn
marked.
"""

from __future__ import annotations

import json
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.data.answers import BEST
from align.data.chat import Chat, Span, Unwritable, chat_of
from align.data.formats import FORMATS, Fault, Row
from align.data.reading import Reading
from align.data.trees import Tree
from align.recipe.errors import UserError, printable

LossOn = Literal["assistant", "last", "all"]


def conversations(loss_on: LossOn) -> Reading:
    """Conversations and text, and the best answers of preferences, learnt as `render_rows` says."""
    return Reading(f"conversations, {loss_on}", {**BEST, **FORMATS}, partial(render_rows, loss_on=loss_on))


def render_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> list[Tree | Fault]:
    """Each row as a tree of one segment, or why it cannot be one.

    `assistant` trains every assistant turn from its first token to its end-of-turn token, `last` only the
    last one, `all` every token but a row's first. Turns with `train: False` are never trained. A text row
    ends with the end-of-text token and is trained whole. Masks come from places in the text, so pad == eos
    changes nothing.

    Raises UserError for a tokenizer without offsets (a slow one).
    """
    rendered: list[Tree | Fault | None] = [_text(row, tokenizer) if row.messages is None else None for row in rows]
    chats: list[tuple[int, str, list[Span]]] = []
    chat = chat_of(tokenizer) if None in rendered else None
    for i, row in enumerate(rows):
        if row.messages is not None:
            try:
                chats.append((i, *_written(row, chat, loss_on)))
            except Unwritable as error:
                rendered[i] = Fault(row.file, row.line, str(error))
    paths = tokenised([(text, spans) for _, text, spans in chats], tokenizer)
    for (i, *_), (ids, trained) in zip(chats, paths, strict=True):
        rendered[i] = _tree(rows[i], ids, trained)
    return rendered


def tokenised(
    written: list[tuple[str, list[Span]]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text, written by a chat template, as tokens (n,) int32 and which of them its spans train (n,) bool.

    Raises UserError for a tokenizer without offsets (a slow one).
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: no fast tokenizer, which tells where in the text each token stands")
    if not written:
        return []
    encoded = tokenizer(
        [text for text, _ in written],
        add_special_tokens=False,  # the template has written them
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        (np.array(ids, np.int32), _covered(np.array(offsets).reshape(-1, 2), spans))
        for (_, spans), ids, offsets in zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def render(row: Row, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Tree | Fault:
    """One row; `render_rows` says how."""
    return render_rows([row], tokenizer, loss_on)[0]


def show(tree: Tree, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """The tree's text with its trained tokens green, or, without colour, between ⟦ and ⟧; branches by name."""
    stem, *branches = tree.segments
    shown = _marked(stem, tree.trained[0], 0, tokenizer, colour)
    shown.rstrip()
    for name, ids, trained in zip(_names(tree), branches, tree.trained[1:], strict=True):
        shown.append(f"\n── {name} ──\n", style="bold" if colour else None)
        path, marks = np.concatenate([stem, ids]), np.concatenate([np.zeros(len(stem), bool), trained])
        shown.append_text(_marked(path, marks, len(stem), tokenizer, colour))
    return shown


def _names(tree: Tree) -> list[str]:
    """What the branches are called."""
    count = len(tree.segments) - 1
    if count == 1:
        return ["answer" if not tree.targets else "desirable" if tree.targets[0] else "undesirable"]
    if count == 2:
        return [f"chosen, by a margin of {tree.targets[0]:g}" if tree.targets else "chosen", "rejected"]
    return [f"answer {i + 1} of {count}" for i in range(count)]


def _marked(ids: np.ndarray, trained: np.ndarray, start: int, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """The text of the tokens from `start` on."""
    shown = Text()
    edges = [start, *(start + 1 + np.flatnonzero(np.diff(trained[start:]))), len(ids)]
    # Decoded from the beginning, for many decoders write the first token of a text without its space.
    written = tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
    for first, last in pairwise(edges):
        text = tokenizer.decode(ids[:last], clean_up_tokenization_spaces=False)
        run, written = printable(text[len(written) :]), text
        marked = f"⟦{run}⟧" if trained[first] and not colour else run
        shown.append(marked, style="green" if trained[first] and colour else None)
    return shown


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


def _text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Tree | Fault:
    ids = tokenizer(row.text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return _tree(row, ids, np.ones(len(ids), bool))


def _written(row: Row, chat: Chat, loss_on: LossOn) -> tuple[str, list[Span]]:
    """The conversation's text and the spans of it to be trained. Raises Unwritable."""
    said = [message for message in row.messages if message["role"] == "assistant"]
    context = {i for i, message in enumerate(said) if message.get("train") is False}
    taught = set(range(len(said))) - context
    if loss_on == "last":
        taught = {i for i in taught if i == len(said) - 1}
    if not taught:
        which = "the last assistant turn is" if loss_on == "last" and said else "there is no assistant turn but"
        raise Unwritable(f"no trained token: {which} context only")
    for i in sorted(taught):
        if not (said[i]["content"].strip() or said[i].get("tool_calls")):
            raise Unwritable(f"no trained token in assistant turn {i + 1}: it is empty")
    if loss_on != "all":
        return chat.turns(row.messages, row.tools, taught)
    text, spans = chat.turns(row.messages, row.tools, context)
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return text, [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


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


def _tree(row: Row, ids: Any, trained: np.ndarray) -> Tree | Fault:
    trained[:1] = False  # nothing stands before it to predict it from
    if not trained.any():
        return Fault(row.file, row.line, "no trained token: too short, as nothing predicts a row's first token")
    return Tree((np.array(ids, np.int32),), (trained,))


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
