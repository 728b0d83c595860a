"""Conversations with a model: each user turn is answered, and the answer told while it is sampled.

Every answer stands on the whole conversation as the chat template writes it for training. Keys and values of earlier
turns are kept, and found by their tokens: what the template writes as it did before is not computed again, and what it
writes differently, since a later turn follows, is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from align.data.formats.prompts import prompts
from align.data.formats.rows import Fault, Row
from align.models.checkpoints.adapters import token_without_row
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.sampling.requests import Request, Said
from align.recipe.errors import UserError
from align.tools.chat.speaker import Speaker

Say = Callable[[str], object]
Ended = Literal["ended", "max_new", "context", "stopped"]
NEAR = 16  # tokens of the prompt that may decide how the first ones of an answer are written


class Answer(NamedTuple):
    """What the model said, and why it said no more."""

    text: str
    end: Ended


class Talk:
    """The turns so far; an answer depends on them, on the seed and on its number among the answers."""

    def __init__(self, speaker: Speaker, sampling: Sampling, seed: int, system: str = "") -> None:
        self.speaker, self.sampling, self.seed, self.system = speaker, sampling, seed, system
        self.turns: list[dict[str, Any]] = []  # user and assistant, in pairs

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as align.sft reads it."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def prompt(self, text: str) -> np.ndarray:
        """The conversation with one more user turn, up to where the answer begins, (l,) int32."""
        row = Row("", 0, [*self.messages, {"role": "user", "content": text}], None, None)
        (tree,) = prompts().render([row], self.speaker.tokenizer)
        if isinstance(tree, Fault):
            raise UserError(tree.reason)
        if fault := token_without_row(self.speaker.tokenizer, tree.segments[0], self.speaker.trunk.rows):
            raise UserError(f"the turn {fault}")
        return tree.segments[0]

    def ask(self, text: str, say: Say, stopping: Callable[[], object] = lambda: False) -> Answer:
        """The answer to a user turn, told to `say` piece by piece; it ends early once `stopping()` is true.

        Raises UserError where there is no room for one.
        """
        (answer,) = hear([self.begin(text, say)], stopping)
        return answer

    def begin(self, text: str, say: Say) -> Coming:
        """The answer to a user turn, which is told to `say` piece by piece once it is heard (`hear`).

        Raises UserError where there is no room for one.
        """
        prompt, room = self.prompt(text), self.speaker.room
        left = self.sampling.max_new if room is None else room - len(prompt)
        if left < 1:
            raise UserError(
                f"the conversation, {len(prompt):,} tokens, fills the {room:,} positions of the model; begin anew "
                "(/reset), or ask for less"
            )
        how = self.sampling._replace(max_new=min(self.sampling.max_new, left))
        return Coming(self, text, prompt, how, say)


class Coming:
    """An answer while it comes."""

    def __init__(self, talk: Talk, asked: str, prompt: np.ndarray, how: Sampling, say: Say) -> None:
        """`prompt`: (l,) int32, which `asked` is the end of."""
        self.talk, self.speaker, self.asked, self.prompt, self.how = talk, talk.speaker, asked, prompt, how
        self.key = (talk.seed, len(talk.turns) // 2)
        self.tokens: list[int] = []
        self.end: Ended = "stopped"  # until it is known better
        self.stream = Stream(lambda tokens: self.speaker.said(prompt[-NEAR:], tokens), say)

    def join(self) -> Request:
        """Its row of the running batch."""
        row = Request(self.speaker.voice, self.prompt, self.how, (*self.key, 0))
        self.speaker.running.join(row)
        return row

    def search(self, stopping: Callable[[], object]) -> None:
        """By beams, all at once."""

        def heed(_tokens: list[int]) -> None:
            if stopping():
                raise _Stopped

        try:
            ((response,),) = sample(self.speaker.trunk, [self.prompt], self.how, [self.key], heed=heed)
        except _Stopped:
            return
        self.tokens = response.tokens.tolist()
        self.finish(response.ended)

    def take(self, said: Said) -> None:
        """One more token."""
        if said.end == "fault":
            raise UserError(f"{said.fault}; try another dtype, or look at the checkpoint")
        self.tokens.append(said.token)
        self.stream.tell(self.tokens)
        if said.end is not None:
            self.finish(said.end == "stop")

    def finish(self, ended: bool) -> None:
        """It is whole: by its own end, or by its length."""
        cut: Ended = "context" if self.how.max_new < self.talk.sampling.max_new else "max_new"
        self.end = "ended" if ended else cut

    def answer(self) -> Answer:
        """It, or what came of it before it was stopped. One without a word is not kept, nor what was asked."""
        text = self.stream.finish(self.tokens)
        if text:
            self.talk.turns += [{"role": "user", "content": self.asked}, {"role": "assistant", "content": text}]
        return Answer(text, self.end)


def hear(coming: Sequence[Coming], stopping: Callable[[], object] = lambda: False) -> list[Answer]:
    """The answers, of all conversations side by side; they end early once `stopping()` is true."""
    drawn = {each.join(): each for each in coming if each.how.beams == 1}
    batches = list({id(each.speaker.running): each.speaker.running for each in drawn.values()}.values())
    try:
        while not stopping() and not all(batch.idle for batch in batches):
            for batch in batches:
                for row, said in batch.step():
                    drawn[row].take(said)
        for row in drawn:
            row.cancelled = not row.over
        for batch in batches:
            if not batch.idle:
                batch.step()  # what was broken off leaves it, and what was computed of it is kept for the next turn
    except BaseException:
        for batch in batches:
            batch.clear()
        raise
    for each in coming:
        if each.how.beams > 1:
            each.search(stopping)
    return [each.answer() for each in coming]


class Stream:
    """Tokens as text, told as far as it is certain: no half of a character, no blank that may be the last."""

    def __init__(self, text: Callable[[list[int]], str], say: Say) -> None:
        """`text`: what tokens are, written out."""
        self.text, self.say, self.told = text, say, 0

    def tell(self, tokens: list[int]) -> None:
        """What all the tokens so far add to what was told."""
        self._more(self.text(tokens).rstrip("\ufffd").strip())

    def finish(self, tokens: list[int]) -> str:
        """The rest; and the whole text."""
        text = self.text(tokens).strip()
        self._more(text)
        return text

    def _more(self, text: str) -> None:
        if text[self.told :]:
            self.say(text[self.told :])
            self.told = len(text)


class _Stopped(Exception):
    """The answer is to end here."""
