"""A request for text, from its body to its last token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

import numpy as np

from align.models.sampling.requests import Said
from align.recipe.errors import UserError
from align.tools.serving.engine import Asked, Engine, Full, Gone
from align.tools.serving.limits import Limits, Refusal
from align.tools.serving.models import Served
from align.tools.serving.protocol import MOST_AT_ONCE, Asking, ChatAsking, TextAsking
from align.tools.serving.replies import JSON, Answer, Reply, event, fault
from align.tools.serving.words import Prose, conversation, text


class Answering:
    """The answers to one request, as they come."""

    def __init__(
        self, engine: Engine, limits: Limits, asked: Asking, served: Served, prompts: Sequence[np.ndarray]
    ) -> None:
        """Puts it into the queue. Raises Refusal where it cannot be answered."""
        self.engine = engine
        if len(prompts) * asked.choices > MOST_AT_ONCE:
            raise Refusal(400, f"more than {MOST_AT_ONCE:,} answers are asked for at once")
        self.heard: asyncio.Queue[tuple[Answer, Said]] = asyncio.Queue()
        self.reply = Reply(served, asked, [ids.tolist() for ids in prompts])
        self.requests: list[Asked] = []
        answers = iter(self.reply.answers)
        for ids in prompts:
            self.requests += self._requests(served, asked, ids, limits, [next(answers) for _ in range(asked.choices)])
        submit(engine, self.requests)

    def _requests(
        self, served: Served, asked: Asking, ids: np.ndarray, limits: Limits, answers: Sequence[Answer]
    ) -> list[Asked]:
        """Those for one prompt: the first computes it for all."""
        wanted = asked.asked_tokens
        if wanted is not None and wanted > limits.tokens:
            raise Refusal(400, f"max_tokens: this server gives {limits.tokens:,} tokens at most")
        check(self.engine, ids, wanted or 1)
        most = wanted or min(limits.tokens, self.engine.running.room - len(ids))
        sampling, key, requests = asked.sampling(most), asked.key(), list[Asked]()
        for number, answer in enumerate(answers):
            heard = partial(self._hear, answer)
            first = requests[0] if requests else None
            requests.append(Asked(heard, served.voice, ids, sampling, (key, number), asked.top, first))
        return requests

    def _hear(self, answer: Answer, said: Said) -> None:
        self.heard.put_nowait((answer, said))

    def close(self) -> None:
        """Nobody listens any more: what has not ended leaves the batch."""
        for request in self.requests:
            request.cancelled = True

    async def _each(self) -> AsyncIterator[tuple[Answer, Said]]:
        """What is said, until all have ended. Raises Refusal after a fault."""
        going = len(self.requests)
        while going:
            answer, said = await self.heard.get()
            if said.end == "fault":
                raise Refusal(500, said.fault, "server_error")
            going -= said.end is not None
            yield answer, said

    @property
    def reused(self) -> int:
        """Tokens of the prompts that were known."""
        return sum(request.reused for request in self.requests if request.after is None)

    async def whole(self) -> JSON:
        """The reply at once."""
        async for answer, said in self._each():
            answer.add(said)
        return self.reply.whole(self.reused)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The same as a stream of events."""
        for piece in self.reply.first():
            yield piece
        try:
            async for answer, said in self._each():
                if chunk := self.reply.chunk(answer, answer.add(said)):
                    yield chunk
            for piece in self.reply.last(self.reused):
                yield piece
        except Refusal as refusal:  # the head has gone out already
            yield event(fault(refusal.message, refusal.status, refusal.kind))


def model_of(engine: Engine, name: str) -> Served:
    """By its name. Raises Refusal."""
    if name not in engine.models:
        raise Refusal(404, f"the model {name[:100]!r} does not exist", "not_found_error")
    return engine.models[name]


def full() -> Refusal:
    """As many wait as may."""
    return Refusal(429, "too many requests wait; try again later", "rate_limit_error", retry_after="1")


def answers(engine: Engine, asked: Asking) -> Served:
    """Who answers, with what ends its answers to this request. Raises Refusal."""
    served = model_of(engine, asked.model)
    if not served.answers:
        raise Refusal(400, f"{served.name} only scores texts: ask it at /score")
    return ending_as(served, asked)


def ending_as(served: Served, asked: Asking) -> Served:
    """With what ends its answers to this request."""
    voice = served.voice._replace(ends=frozenset(), stops=()) if asked.ignore_eos else served.voice
    return served._replace(voice=voice._replace(ends=voice.ends.union(asked.stop_token_ids or ())))


def check(engine: Engine, ids: np.ndarray, more: int) -> None:
    """Raises Refusal for a prompt that cannot be computed."""
    if told := engine.fault_of(ids, more):
        raise Refusal(400, told)


def submit(engine: Engine, requests: Sequence[Asked]) -> None:
    """Into the queue. Raises Refusal where it is full, where the model has gone meanwhile, or the server stops."""
    try:
        engine.ask(requests)
    except Full:
        raise full() from None
    except Gone:
        told = "the model was unloaded, or another put in its place, while this request was read; ask again"
        raise Refusal(409, told, "conflict_error") from None
    except UserError as error:
        raise Refusal(503, str(error), "server_error") from None


def prompts_of(served: Served, asked: Asking) -> list[Prose]:
    """What it is to go on from. Raises Refusal."""
    tokenizer = served.voice.tokenizer
    try:
        if isinstance(asked, ChatAsking):
            return [conversation(tokenizer, asked.messages, asked.told_tools)]
        assert isinstance(asked, TextAsking)
        prompts = [
            text(tokenizer, each) if isinstance(each, str) else Prose(0, partial(np.array, each, np.int32))
            for each in asked.prompts
        ]
    except UserError as error:
        raise Refusal(400, str(error)) from None
    if not prompts:
        raise Refusal(400, "prompt: there is none")
    return prompts
