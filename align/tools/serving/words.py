"""What requests say in words becomes tokens, and tokens become words.

Words become tokens in two steps. A chat template writes a prompt, in the main thread, where its time has a limit; its
text becomes tokens in any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.formats.media import REASON
from align.data.formats.prompts import PROMPTING, stems, written
from align.data.formats.rows import Fault, Refused, Row
from align.data.formats.values import shallow
from align.data.templates.chat import Unwritable
from align.data.templates.chats import chat_of
from align.data.templates.control import controls_of, encoded_text
from align.data.templates.render import Written
from align.data.templates.texts import decoded
from align.recipe.errors import UserError

NEAR = 8  # tokens that decide how the next ones are written


class Prose(NamedTuple):
    """A prompt as text."""

    letters: int
    tokens: Callable[[], np.ndarray]  # (l,) int32, in any thread; raises UserError


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Any = None) -> Prose:
    """OpenAI's messages up to where the assistant speaks next. Raises UserError."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: expected a list of messages")
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        raise UserError("messages: the last one is the assistant's; end with what it is to answer")
    return _prose(tokenizer, _canonical({"prompt": messages, "tools": tools}))


def text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Prose:
    """A text that is gone on from. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: it holds half a character (a lone surrogate), which is no text") from None
    return _prose(tokenizer, Row("", 0, None, prompt, None))


def judged(tokenizer: PreTrainedTokenizerBase, messages: Any) -> Prose:
    """A whole conversation, up to its last end of turn, as a reward model reads it. Raises UserError."""
    if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], dict):
        raise UserError("messages: expected a conversation that ends with the assistant's answer")
    if messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
        raise UserError("messages: the last one is to be the assistant's, a text, for it is scored")
    row = _canonical({"prompt": messages[:-1]})
    controls = controls_of(tokenizer)
    try:
        said = {"role": "assistant", "content": messages[-1]["content"]}
        whole = chat_of(tokenizer).written(controls.disguised([*row.messages, said]))
        whole.encode()
    except (Unwritable, UnicodeEncodeError) as error:
        raise UserError(f"messages: {error}") from None
    return Prose(len(whole), lambda: controls.encode([whole], add_special_tokens=False)[0].ids)


def classified(tokenizer: PreTrainedTokenizerBase, given: str, most: int | None) -> Prose:
    """A text as a classifier reads it, cut where it was in training. Raises UserError."""

    def tokens() -> np.ndarray:
        try:
            given.encode()
            (ids,) = encoded_text([given], tokenizer)
        except (Unwritable, UnicodeEncodeError) as error:
            raise UserError(f"input: {error}") from None
        return ids[:most] if len(ids) else np.array([tokenizer.eos_token_id], np.int32)

    return Prose(len(given), tokens)


def _canonical(record: dict[str, Any]) -> Row:
    try:
        return shallow(PROMPTING["prompts"].read(record))
    except (Refused, RecursionError) as refused:
        told = str(refused).replace("prompt[", "messages[").replace(REASON, "this server reads text alone, not")
        for remedy in ("; say in the recipe", "; its keys are", "; drop the row"):  # those are of rows in files
            told = told.partition(remedy)[0]
        raise UserError(told) from None


def _prose(tokenizer: PreTrainedTokenizerBase, row: Row) -> Prose:
    try:
        found = written(row, tokenizer)
    except Unwritable as error:
        raise UserError(str(error)) from None
    return Prose(len(found[0]), partial(_stem, tokenizer, row, found))


def _stem(tokenizer: PreTrainedTokenizerBase, row: Row, found: Written) -> np.ndarray:
    (tree,) = stems([(row, found)], tokenizer)
    if isinstance(tree, Fault):
        raise UserError(tree.reason)
    return tree.segments[0]


class Words:
    """Tokens as text, piece by piece: no half of a character, and nothing that may be the beginning of a stop text.

    What ends a turn, and a stop text, are no part of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        ends: frozenset[int],
        stops: Sequence[str],
        turn_stops: Sequence[str] = (),
    ) -> None:
        """`prompt`: token ids, of which the last decide how the first ones said are written."""
        self.tokenizer, self.ends, self.stops = tokenizer, ends, [*stops, *turn_stops]
        self.ids = [int(i) for i in prompt[-NEAR:]]
        self.first = 0  # of the tokens that are read together
        self.told = len(decoded(tokenizer, self.ids).rstrip("\ufffd"))  # letters of their text that are known already
        self.held = ""  # text that may belong to a stop text
        self.stopped = False

    def add(self, token: int, last: bool = False) -> str:
        """The text that is certain with one more token; with the `last` one, all that is left."""
        if self.stopped:
            return ""
        if not (last and token in self.ends):
            self.ids.append(token)
        self.held += self._more(last)
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.held, self.stopped, last = self.held[: min(found)], True, True
        sure = len(self.held) if last else len(self.held) - self._doubt()
        piece, self.held = self.held[:sure], self.held[sure:]
        return piece

    def _more(self, last: bool) -> str:
        """What the tokens add to the text, without a character whose last bytes are still to come."""
        whole = decoded(self.tokenizer, self.ids[self.first :])
        sure = whole if last else whole.rstrip("\ufffd")
        piece, self.told = sure[self.told :], max(self.told, len(sure))
        count = len(self.ids) - self.first
        if count > 2 * NEAR and (sure == whole or count > 8 * NEAR):  # only the last tokens are read again
            self.first = len(self.ids) - NEAR
            self.told = len(decoded(self.tokenizer, self.ids[self.first :]))
        return piece

    def _doubt(self) -> int:
        """Letters at the end that a stop text may begin with."""
        most = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(most, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stops):
                return length
        return 0
