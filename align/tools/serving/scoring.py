"""POST /score: what reward models and classifiers say of texts. They are rows of the running batch, as answers are."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from uuid import uuid4

import numpy as np

from align.models.sampling.choice import Sampling
from align.models.sampling.requests import Said
from align.recipe.errors import UserError
from align.tools.serving.answering import check, model_of, submit
from align.tools.serving.engine import Asked, Engine
from align.tools.serving.limits import Refusal
from align.tools.serving.models import Served
from align.tools.serving.protocol import MOST_AT_ONCE, ScoreAsking
from align.tools.serving.replies import JSON
from align.tools.serving.words import classified, judged
from align.training.labelling.measures import softmax


class Scoring:
    """The scores of one request's texts."""

    def __init__(self, engine: Engine, asked: ScoreAsking) -> None:
        """Puts them into the queue. Raises Refusal where they cannot be scored."""
        self.served = served = model_of(engine, asked.model)
        if served.answers:
            raise Refusal(400, f"{served.name} scores nothing: it is a model that answers")
        try:
            self.texts = _texts(served, asked)
        except UserError as error:
            raise Refusal(400, str(error)) from None
        if not 0 < len(self.texts) <= MOST_AT_ONCE:
            raise Refusal(400, f"expected 1 to {MOST_AT_ONCE:,} texts")
        for ids in self.texts:
            check(engine, ids, 0)
        self.heard: asyncio.Queue[tuple[int, Said]] = asyncio.Queue()
        self.requests = [
            Asked(partial(self._hear, i), served.voice, ids, Sampling(1), (0,), head=served.head)
            for i, ids in enumerate(self.texts)
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
            found[number] = {"index": number, "object": "score", **self._told(said.scores)}
        tokens = sum(map(len, self.texts))
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        data = [found[i] for i in range(len(self.texts))]
        about = {"id": f"score-{uuid4().hex}", "object": "list", "created": int(time.time())}
        return about | {"model": self.served.name, "data": data, "usage": usage}

    def _told(self, scores: tuple[float, ...]) -> JSON:
        about = self.served.about
        if not np.isfinite(scores).all():
            raise Refusal(500, "the model's scores are not finite", "server_error")
        if self.served.kind == "reward":
            told: JSON = {"score": scores[0]}
            if about.score_mean is not None and about.score_std:
                told["normalized"] = (scores[0] - about.score_mean) / about.score_std
            return told
        shares = softmax(np.array([scores]))[0]
        best = int(shares.argmax())
        if about.threshold is not None:
            best = int(shares[1] >= about.threshold)
        named = {label: float(share) for label, share in zip(about.labels, shares, strict=True)}
        return {"score": float(shares[best]), "label": about.labels[best], "probabilities": named}


def _texts(served: Served, asked: ScoreAsking) -> list[np.ndarray]:
    """What is to be scored, each as token ids. Raises UserError."""
    tokenizer, about = served.voice.tokenizer, served.about
    if served.kind == "classify":
        if asked.input is None:
            raise UserError("input: a classifier reads a text, or a list of them")
        given = [asked.input] if isinstance(asked.input, str) else asked.input
        return [classified(tokenizer, each, about.max_length) for each in given]
    return [judged(tokenizer, talk) for talk in _talks(asked)]


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
