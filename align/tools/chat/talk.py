"""A conversation with a trunk: each user turn is answered, and the answer told while it is sampled.

Every answer reads the whole conversation anew, as the chat template writes it for training: templates may write earlier
turns differently once a later one follows, so keys and values of before are not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from align.data.formats.formats import Fault, Row
from align.data.formats.prompts import prompts
from align.models.checkpoints.adapters import token_without_row
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.trunk import Trunk
from align.recipe.errors import UserError

Say = Callable[[str], object]
NEAR = 16  # tokens of the prompt that may decide how the first ones of an answer are written


class Answer(NamedTuple):
    """What the model said, and why it said no more."""

    text: str
    end: Literal["ended", "max_new", "context", "stopped"]


class Talk:
    """The turns so far; an answer depends on them, on the seed and on its number among the answers."""

    def __init__(self, trunk: Trunk, sampling: Sampling, seed: int, system: str = "") -> None:
        self.trunk, self.sampling, self.seed, self.system = trunk, sampling, seed, system
        self.turns: list[dict[str, Any]] = []  # user and assistant, in pairs

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as align.sft reads it."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    @property
    def room(self) -> int | None:
        """Positions of the model, for prompt and answer together; None where there is no limit."""
        return getattr(self.trunk.plain.config.get_text_config(), "max_position_embeddings", None)

    def prompt(self, text: str) -> np.ndarray:
        """The conversation with one more user turn, up to where the answer begins, (l,) int32."""
        row = Row("", 0, [*self.messages, {"role": "user", "content": text}], None, None)
        (tree,) = prompts().render([row], self.trunk.tokenizer)
        if isinstance(tree, Fault):
            raise UserError(tree.reason)
        if fault := token_without_row(self.trunk.tokenizer, tree.segments[0], self.trunk.rows):
            raise UserError(f"the turn {fault}")
        return tree.segments[0]

    def ask(self, text: str, say: Say, stopping: Callable[[], object] = lambda: False) -> Answer:
        """The answer to a user turn, told to `say` piece by piece; it ends early once `stopping()` is true.

        An answer without a word is not kept, nor what was asked. Raises UserError where there is no room for one.
        """
        prompt = self.prompt(text)
        room = self.sampling.max_new if self.room is None else self.room - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation, {len(prompt):,} tokens, fills the {self.room:,} positions of the model; begin anew "
                "(/reset), or ask for less"
            )
        how = self.sampling._replace(max_new=min(self.sampling.max_new, room))
        tokens: list[int] = []
        before = prompt[-NEAR:]
        stream = Stream(lambda tokens: self.trunk.said(before, tokens), say)

        def heed(more: list[int]) -> None:
            if stopping():
                raise _Stopped
            tokens.extend(more)
            stream.tell(tokens)

        try:
            ((response,),) = sample(self.trunk, [prompt], how, [(self.seed, len(self.turns) // 2)], heed=heed)
            tokens = response.tokens.tolist()
            cut = "context" if how.max_new < self.sampling.max_new else "max_new"
            end = "ended" if response.ended else cut
        except _Stopped:
            end = "stopped"
        answer = stream.finish(tokens)
        if answer:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return Answer(answer, end)


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
