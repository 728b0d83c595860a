"""POST /score: what reward models and classifiers say of texts. They are rows of the running batch, as answers are,
but for those on trunks of their own (`readers.py`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from uuid import uuid4

import numpy as np

from align.models.checkpoints.adapters import token_without_row
from align.models.checkpoints.results import About
from align.models.sampling.choice import Sampling
from align.models.sampling.requests import Said
from align.recipe.errors import UserError
from align.tools.serving.answering import check, full, model_of, submit
from align.tools.serving.engine import Asked, Engine
from align.tools.serving.limits import Refusal
from align.tools.serving.models import Served
from align.tools.serving.protocol import MOST_AT_ONCE, ScoreAsking
from align.tools.serving.readers import portions
from align.tools.serving.replies import JSON
from align.tools.serving.words import Prose, classified, judged
from align.training.labelling.measures import softmax

INFINITE = "the model's scores are not finite"


def scores(engine: Engine, asked: ScoreAsking) -> Served:
    """Who scores. Raises Refusal."""
    served = model_of(engine, asked.model)
    if served.answers:
        raise Refusal(400, f"{served.name} scores nothing: it is a model that answers")
    return served


class Scoring:
    """The scores of one request's texts."""

    def __init__(self, engine: Engine, served: Served, texts: list[np.ndarray]) -> None:
        """Puts them into the queue. Raises Refusal where they cannot be scored."""
        self.served, self.texts = served, texts
        for ids in texts:
            check(engine, ids, 0)
        self.heard: asyncio.Queue[tuple[int, Said]] = asyncio.Queue()
        self.requests = [
            Asked(partial(self._hear, i), served.voice, ids, Sampling(1), (0,), head=served.head)
            for i, ids in enumerate(texts)
        ]
        submit(engine, self.requests)

    def _hear(self, number: int, said: Said) -> None:
        self.heard.put_nowait((number, said))

    def close(self) -> None:
        """Nobody listens any more."""
        for request in self.requests:
            request.cancelled = True

    async def whole(self) -> JSON:
        """The reply. Raises Refusal after a fault."""
        found: dict[int, JSON] = {}
        while len(found) < len(self.texts):
            number, said = await self.heard.get()
            if said.end == "fault":
                raise Refusal(500, said.fault, "server_error")
            found[number] = _told(self.served.about, np.array(said.scores))
        return _reply(self.served, [found[i] for i in range(len(self.texts))], self.texts)


class Reading:
    """The classes of one request's texts, by a classifier on a trunk of its own."""

    def __init__(self, engine: Engine, served: Served, texts: list[np.ndarray]) -> None:
        """Raises Refusal where too many others wait, and for a token that the trunk has no row for."""
        tokenizer, rows = served.voice.tokenizer, served.reader.trunk.rows
        if told := next(filter(None, (token_without_row(tokenizer, ids, rows) for ids in texts)), None):
            raise Refusal(400, f"input: it {told}")
        if engine.waiting >= engine.most_waiting:
            raise full()
        self.engine, self.served, self.texts = engine, served, texts
        self.task: Future[np.ndarray] | None = None

    def close(self) -> None:
        """Nobody listens any more."""
        if self.task:
            self.task.cancel()

    async def whole(self) -> JSON:
        """The reply."""
        found: list[JSON] = []
        for portion in portions([ids.tolist() for ids in self.texts]):
            self.task = self.engine.do(partial(self.served.reader.shares, portion))
            found += [_classes(self.served.about, shares) for shares in await asyncio.wrap_future(self.task)]
        return _reply(self.served, found, self.texts)


def _reply(served: Served, found: list[JSON], texts: Sequence[np.ndarray]) -> JSON:
    tokens = sum(map(len, texts))
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    data = [{"index": number, "object": "score", **told} for number, told in enumerate(found)]
    about = {"id": f"score-{uuid4().hex}", "object": "list", "created": int(time.time())}
    return about | {"model": served.name, "data": data, "usage": usage}


def _told(about: About, scores: np.ndarray) -> JSON:
    """What a head's scores, (K,), say."""
    if not np.isfinite(scores).all():
        raise Refusal(500, INFINITE, "server_error")
    if about.stage == "classify":
        return _classes(about, softmax(scores[None])[0])
    told: JSON = {"score": float(scores[0])}
    if about.score_mean is not None and about.score_std:
        told["normalized"] = (told["score"] - about.score_mean) / about.score_std
    return told


def _classes(about: About, shares: np.ndarray) -> JSON:
    """What the probabilities of classes, (C,), say."""
    if not np.isfinite(shares).all():
        raise Refusal(500, INFINITE, "server_error")
    best = int(shares.argmax())
    if about.threshold is not None:
        best = int(shares[1] >= about.threshold)
    named = {label: float(share) for label, share in zip(about.labels, shares, strict=True)}
    return {"score": float(shares[best]), "label": about.labels[best], "probabilities": named}


def texts_of(served: Served, asked: ScoreAsking) -> list[Prose]:
    """What is to be scored. Raises Refusal."""
    try:
        texts = _texts(served, asked)
    except UserError as error:
        raise Refusal(400, str(error)) from None
    if not 0 < len(texts) <= MOST_AT_ONCE:
        raise Refusal(400, f"expected 1 to {MOST_AT_ONCE:,} texts")
    return texts


def _texts(served: Served, asked: ScoreAsking) -> list[Prose]:
    if served.kind == "classify":
        if asked.input is None:
            raise UserError("input: a classifier reads a text, or a list of them")
        given = [asked.input] if isinstance(asked.input, str) else asked.input
        most = served.about.max_length if served.reader is None else served.reader.max_length
        return [classified(served.voice.tokenizer, each, most) for each in given]
    return [judged(served.voice.tokenizer, talk) for talk in _talks(asked)]


def _talks(asked: ScoreAsking) -> list[list]:
    """Conversations, as they are or of prompts and answers; one prompt goes with any number of answers."""
    if asked.messages is not None:
        several = bool(asked.messages) and all(isinstance(each, list) for each in asked.messages)
        return asked.messages if several else [asked.messages]
    if asked.text_1 is None or asked.text_2 is None:
        raise UserError("messages: a reward model reads conversations; or text_1 and text_2, prompts and answers")
    prompts, answers = ([each] if isinstance(each, str) else each for each in (asked.text_1, asked.text_2))
    prompts = prompts * len(answers) if len(prompts) == 1 else prompts
    if len(prompts) != len(answers):
        raise UserError(f"text_2: {len(answers)} answers to {len(prompts)} prompts")
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
