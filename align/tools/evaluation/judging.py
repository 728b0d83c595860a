"""A language model behind an OpenAI-compatible endpoint as the judge between two responses to one prompt.

Every pair is judged twice, with the sides swapped (Zheng et al. 2023, arXiv 2306.05685): what counts is only a verdict
that is the same both times. All else (a judge that contradicts itself, that cannot be reached, is late, refuses, or
answers something else than a verdict) is excluded, and counted by its kind.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPException
from threading import Thread
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from pydantic import Field

from align.data.formats.prompts import Asked
from align.recipe.errors import UserError
from align.recipe.schema import PositiveInt, Section
from align.tools.comparison.evaluated import Evaluated
from align.tools.comparison.statistics import duel
from align.tools.evaluation.generation import Responses
from align.training.bootstrap import Draws, Estimate

T, R = TypeVar("T"), TypeVar("R")
INSTRUCTION = (
    "You compare two answers to the same prompt, A and B. Judge which one is more helpful, correct and clear; neither "
    "their order nor their length counts. End with your verdict: [[A]], [[B]], or [[C]] for a tie."
)
VERDICT = re.compile(r"\[\[([ABC])\]\]")
SWAPPED = {"A": "B", "B": "A", "C": "C"}
WORTH = {"A": 1.0, "B": -1.0, "C": 0.0}
LOST = 5  # pairs in a row that never reached the judge: the others are not tried
Failure = Literal["unreachable", "timeout", "refused", "nonsense", "contradiction", "not_asked"]
FAILURES: tuple[Failure, ...] = ("contradiction", "nonsense", "refused", "timeout", "unreachable", "not_asked")


class Endpoint(Section):
    """Where the judge is asked."""

    url: Annotated[str, Field(pattern="^https?://")]
    """The API's base, such as http://localhost:8000/v1; `/chat/completions` is added to it."""
    model: str
    """The model's name there."""
    api_key_env: str | None = None
    """The environment variable that holds the key; the key itself is never written anywhere. Default: no key."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds to wait for an answer."""
    retries: Annotated[int, Field(ge=0)] = 2
    """More tries after one that did not get through."""
    parallel: PositiveInt = 4
    """Pairs that are judged at once."""
    max_tokens: PositiveInt = 512
    """Most tokens of a verdict with its reasons."""
    instruction: str = INSTRUCTION
    """What the judge goes by; it must ask for [[A]], [[B]] or [[C]]."""


class Pair(NamedTuple):
    """Two responses to one prompt: this policy's, and its opponent's."""

    prompt: str
    own: str
    other: str


class Verdicts(NamedTuple):
    """What a judge said of n pairs."""

    margins: np.ndarray  # (n,) 1 where the own response is better, -1 the other, 0 a tie, nan excluded
    excluded: Counter[str]  # by kind

    def win_rate(self, lengths: np.ndarray, others: np.ndarray, draws: Draws) -> tuple[Estimate, Estimate]:
        """The share of wins, a tie one half, and that at equal length; lengths (n,) tokens of both sides."""
        columns = (self.margins, np.where(np.isnan(self.margins), np.nan, 0.0), lengths, others)
        found = duel(*(column[:, None].astype(np.float64) for column in columns), draws)
        return tuple(
            Estimate(*((1 + x) / 2 for x in margin[:3]), margin.n) for margin in (found.margin, found.equal_length)
        )


class EndpointJudge:
    """Asks one endpoint."""

    def __init__(self, endpoint: Endpoint, key: str) -> None:
        """`key`: what the endpoint is called in the recipe. Raises UserError where its API key is not set."""
        self.endpoint, self.headers, self.lost = endpoint, {"Content-Type": "application/json"}, 0
        if endpoint.api_key_env is not None:
            secret = os.environ.get(endpoint.api_key_env)
            if not secret:
                raise UserError(f"{key}.api_key_env: the environment variable {endpoint.api_key_env} is not set")
            self.headers["Authorization"] = f"Bearer {secret}"

    def __call__(self, pairs: Sequence[Pair]) -> Verdicts:
        """Judge every pair, both ways round."""
        found = at_once(self._pair, pairs, self.endpoint.parallel)
        margins = [WORTH.get(verdict, math.nan) for verdict in found]
        return Verdicts(np.array(margins), Counter(verdict for verdict in found if verdict not in WORTH))

    def _pair(self, pair: Pair) -> str:
        """A, B or C for the own response, the other, a tie; or the kind of failure."""
        if self.lost >= LOST:
            return "not_asked"
        first = self._verdict(pair.prompt, pair.own, pair.other)
        if first in WORTH:
            second = self._verdict(pair.prompt, pair.other, pair.own)
            verdict = SWAPPED.get(second, second)
            found = first if verdict == first else "contradiction" if verdict in WORTH else verdict
        else:
            found = first
        self.lost = self.lost + 1 if found in ("unreachable", "timeout", "refused") else 0
        return found

    def _verdict(self, prompt: str, a: str, b: str) -> str:
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), 8))
            said = self._said(prompt, a, b)
            if said not in ("unreachable", "timeout"):
                break
        return said

    def _said(self, prompt: str, a: str, b: str) -> str:
        """The verdict of one request, or how it failed."""
        asked = f"# Prompt\n\n{prompt}\n\n# Answer A\n\n{a}\n\n# Answer B\n\n{b}"
        messages = [{"role": "system", "content": self.endpoint.instruction}, {"role": "user", "content": asked}]
        body = {
            "model": self.endpoint.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.endpoint.max_tokens,
        }
        url = self.endpoint.url.rstrip("/") + "/chat/completions"
        try:
            request = Request(url, json.dumps(body).encode(), self.headers)
            with urlopen(request, timeout=self.endpoint.timeout) as reply:
                said = json.load(reply)["choices"][0]["message"]["content"]
        except HTTPError as error:
            return "unreachable" if error.code == 429 or error.code >= 500 else "refused"
        except TimeoutError:
            return "timeout"
        except URLError as error:
            return "timeout" if isinstance(error.reason, TimeoutError) else "unreachable"
        except (OSError, HTTPException):
            return "unreachable"
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return "nonsense"
        verdicts = set(VERDICT.findall(said)) if isinstance(said, str) else set()
        return verdicts.pop() if len(verdicts) == 1 else "nonsense"


def at_once(function: Callable[[T], R], items: Sequence[T], count: int) -> list[R]:
    """`function` of each item, in order, `count` at a time. What ends this command waits for none of them: they run in
    threads that a process ends without."""
    tasks: list[Future[R]] = [Future() for _ in items]
    left = deque(zip(items, tasks, strict=True))

    def work() -> None:
        with suppress(IndexError):  # none is left: what a function raises stays in its task
            while True:
                item, task = left.popleft()
                try:
                    task.set_result(function(item))
                except BaseException as error:
                    task.set_exception(error)

    for _ in range(min(count, len(items))):
        Thread(target=work, daemon=True).start()
    return [task.result() for task in tasks]


def judged(
    name: str, ask: EndpointJudge, other: Evaluated, responses: Responses, draws: Draws
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Win rates over another evaluation's responses to the same prompts, and what was excluded, by kind."""
    samples = responses.episodes.samples
    own = responses.answered[::samples]
    pairs = [Pair(talk(one.asked), one.response, text) for one, text in zip(own, other.responses, strict=True)]
    verdicts = ask(pairs)
    rates = verdicts.win_rate(responses.figures["tokens"][:, 0], other.lengths[:, 0], draws)
    names = f"win_rate/{name}", f"win_rate_equal_length/{name}"
    excluded = {kind: verdicts.excluded[kind] for kind in FAILURES}
    counts = {"model": ask.endpoint.model, "pairs": len(pairs), "excluded": excluded}
    return dict(zip(names, rates, strict=True)), counts


def talk(row: Asked) -> str:
    """A prompt as a judge reads it."""
    if row.messages is None:
        return row.text or ""
    if len(row.messages) == 1:
        return row.messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in row.messages)
