"""Preferences as token trees: the prompt is the stem, each answer a branch, the best first.

What a branch learns is what SFT would learn of the same answer: from its first token to its end-of-turn token. Each
prompt with its answer is written and tokenised as one conversation, so a path holds exactly the tokens that a model
would see of that conversation alone.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.balance import balanced
from align.data.formats.answers import BEST, COMPARED, JUDGED
from align.data.formats.formats import FORMATS, Fault, Row
from align.data.formats.reading import Reading
from align.data.templates.chat import Chat, Unwritable
from align.data.templates.chats import chat_of
from align.data.templates.control import Controls, controls_of
from align.data.templates.render import Written, tokenised
from align.data.trees import Tree


def preferences() -> Reading:
    """Pairs, transcripts and ranked lists: a tree of two or more branches, the best first."""
    return Reading("preferences", COMPARED, render_answers)


def labelled(desirable: float = 1.0, undesirable: float = 1.0) -> Reading:
    """Single answers, each with its verdict: a tree of one branch whose target is 1.0 or 0.0. Both have weights."""
    survey = partial(balanced, desirable=desirable, undesirable=undesirable)
    return Reading("labelled answers", JUDGED, render_answers, survey=survey)


def demonstrations() -> Reading:
    """Conversations, each as its prompt with the last assistant turn for its one answer."""
    return Reading("demonstrations", {**BEST, **FORMATS}, _render_last)


def _render_last(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Tree | Fault]:
    rows = [row._replace(messages=(row.messages or [])[:-1], answers=tuple(row.messages or [])[-1:]) for row in rows]
    rendered = iter(render_answers([row for row in rows if row.answers], tokenizer))
    bare = "expected a conversation that ends with an answer, found plain text"
    return [next(rendered) if row.answers else Fault(row.file, row.line, bare) for row in rows]


def render_answers(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[Tree | Fault]:
    """Each row as a stem with one branch an answer, or why it cannot be one. Raises UserError as `tokenised` does.

    The stem is all that the paths share before the first trained token; what the template writes after the end of the
    answers' turn is left off.
    """
    chat, controls = chat_of(tokenizer), controls_of(tokenizer)
    written: list[list[Written] | Fault] = []
    for row in rows:
        try:
            written.append(_written(row, chat, controls))
        except Unwritable as error:
            written.append(Fault(row.file, row.line, str(error)))
    texts = [text for texts in written if not isinstance(texts, Fault) for text in texts]
    paths = iter(tokenised(texts, controls))
    return [
        texts if isinstance(texts, Fault) else _tree(row, [next(paths) for _ in texts], texts)
        for row, texts in zip(rows, written, strict=True)
    ]


def _written(row: Row, chat: Chat, controls: Controls) -> list[Written]:
    """For each answer the whole conversation's text and the span of the answer in it. Raises Unwritable."""
    last = sum(message["role"] == "assistant" for message in row.messages)
    messages, answers, tools = (controls.words(row, part) for part in (row.messages, list(row.answers), row.tools))
    texts: list[Written] = []
    prompts: set[str] = set()
    for answer in answers:
        text, (turn,) = chat.turns([*messages, answer], tools, {last})
        if turn.lost:
            raise Unwritable(
                f"the chat template leaves out the {turn.lost} of an answer; give one that keeps them in "
                "model.chat_template, or take them out of the row"
            )
        texts.append((text, [(turn.own, turn.end)], controls.notes(text)))
        prompts.add(text[: turn.begin])
    if len(prompts) > 1:
        raise Unwritable("the chat template writes the prompt in another way before another answer")
    return texts


def _tree(row: Row, paths: list[tuple[np.ndarray, np.ndarray]], written: list[Written]) -> Tree | Fault:
    if not all(trained.any() for _, trained in paths):
        return Fault(row.file, row.line, "no trained token in an answer: the chat template leaves nothing of it")
    ids = [ids[: np.flatnonzero(trained)[-1] + 1] for ids, trained in paths]
    stem = min(int(trained.argmax()) for _, trained in paths)
    heads = np.stack([path[:stem] for path in ids])
    parted = np.flatnonzero((heads != heads[0]).any(0))
    stem = int(parted[0]) if len(parted) else stem
    if stem == 0:
        return Fault(row.file, row.line, "no token before the answers that all share, to predict them from")
    branches = tuple(path[stem:] for path in ids)
    if len({branch.tobytes() for branch in branches}) < len(branches):
        return Fault(row.file, row.line, "two answers are the same as the chat template writes them")
    marks = tuple(trained[stem : len(path)] for path, (_, trained) in zip(ids, paths, strict=True))
    notes = tuple(dict.fromkeys(note for *_, notes in written for note in notes))
    return Tree((ids[0][:stem], *branches), (np.zeros(stem, bool), *marks), row.targets, notes=notes)
