"""What ends an assistant's turn: derived from the chat template as it trains, and used wherever responses are sampled.

A base whose end-of-text token is another than the end that its template writes would never stop after a training.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from align.data.templates.chat import ANSWER, ASK, CALLING, FUNCTION, Chat, Unwritable
from align.data.templates.chats import chat_of
from align.recipe.errors import UserError


class TurnEnds(NamedTuple):
    """What a model was taught to write last."""

    ids: tuple[int, ...]  # tokens that each end a turn
    texts: tuple[str, ...]  # where the end is no single token: texts that do

    @property
    def remark(self) -> str:
        """What a user should know; empty where the end is one token."""
        if self.ids:
            return ""
        if self.texts:
            named = " or ".join(map(repr, self.texts))
            return (
                f"the chat template ends a turn with {named}, which is no single token: responses are ended there by "
                "their text, and other programs need it as a stop string"
            )
        return "the chat template writes nothing after an answer: what is trained on it never learns to stop"


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> TurnEnds:
    """The ends of the turns that the tokenizer's chat template writes; none where it has none that can be used."""
    if not tokenizer.chat_template:
        return TurnEnds((), ())
    try:
        tokens, texts = _ends(chat_of(tokenizer), tuple(tokenizer.added_tokens_encoder))
    except UserError:
        return TurnEnds((), ())
    return TurnEnds(tuple(sorted(tokenizer.convert_tokens_to_ids(list(tokens)))), texts)


@lru_cache(maxsize=32)
def _ends(chat: Chat, added: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Added tokens, and texts where there is no such token."""
    tokens, texts, inside = set(), set(), set()
    token = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
    thinking, tools = ANSWER | {"reasoning_content": "because"}, [{"type": "function", "function": FUNCTION}]
    talks = [
        ([ASK, ANSWER, ASK, ANSWER], None, {0, 1}),
        ([ASK, ANSWER, {"role": "system", "content": "s"}, ASK, ANSWER], None, {0, 1}),
        ([ASK, thinking], None, {0}),
        ([ASK, CALLING], tools, {0}),
    ]
    for messages, given, wanted in talks:
        try:
            text, turns = chat.turns(messages, given, wanted)
        except Unwritable:
            continue
        for turn in turns:
            said = text[turn.own : turn.end].rstrip()
            found = list(token.finditer(said))
            if found and found[-1].end() == len(said):
                tokens.add(found.pop().group())
            elif "answer" in said and (tail := said.rpartition("answer")[2].strip()):
                texts.add(tail)
            inside |= {each.group() for each in found}
    return tuple(sorted(tokens - inside)), () if tokens - inside else tuple(sorted(texts))
