"""A request to the running batch: a prompt that is answered or scored, and what it has come to.

Shapes: l tokens of a prompt, t tokens said, V vocabulary, d hidden size, K scores.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.models.sampling.choice import Sampling, uniforms
from align.models.sampling.pools import Kept

End = Literal["stop", "length", "scored", "fault"]


class Voice(NamedTuple):
    """Who speaks: its number or BARE, and what ends its answers."""

    adapter: int
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()


class Said(NamedTuple):
    """What a step brought a row."""

    token: int | None = None
    logprob: float = 0.0  # of the token under the model's own distribution, before temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, best first
    end: End | None = None
    scores: tuple[float, ...] = ()  # where the request was to be scored
    fault: str = ""


class Request:
    """One row of the batch, from when it waits to its end."""

    def __init__(
        self,
        voice: Voice,
        prompt: np.ndarray,
        sampling: Sampling,
        key: tuple[int, ...],
        top: int | None = None,
        after: Request | None = None,
        head: Tensor | None = None,
    ) -> None:
        """`prompt` (l,) int32; `key` fixes the draws; `top`: how many likeliest tokens are told beside the log-
        probability, None: neither; `after`: another of the same prompt, which computes it for both; `head` (K, d)
        float32: nothing is said, the prompt is scored."""
        self.voice, self.prompt, self.sampling = voice, prompt, sampling
        self.top, self.after, self.head = top, after, head
        self.said: list[int] = []
        self.drawn = uniforms(key, 0 if head is not None else sampling.max_new)
        self.stops = (*sampling.stop, *voice.stops)
        self.seen: Tensor | None = None  # (V,) bool, where what was said is penalised
        self.kept: Kept | None = None
        self.reused = 0  # tokens of the prompt that were known
        self.cancelled = self.over = False

    @property
    def tokens(self) -> np.ndarray:
        """(l + t,) int32 so far."""
        return np.concatenate([self.prompt, np.array(self.said, np.int32)])

    @property
    def length(self) -> int:
        """Of `tokens`."""
        return len(self.prompt) + len(self.said)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not kept yet."""
        return self.length - (self.kept.length if self.kept else 0)

    def stopped(self) -> bool:
        """Whether it has just said a stop text."""
        if not self.stops or len(self.said) < self.sampling.min_new:
            return False
        tail = self.voice.tokenizer.decode(self.said[-max(map(len, self.stops)) - 1 :])
        return any(stop in tail for stop in self.stops)
