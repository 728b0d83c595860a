"""Rows that responses grow in: their prompts computed once, packed, then one more token a row a step.

Shapes: N prompts, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.templates.ends import turn_ends
from align.data.trees import Tree, plant
from align.models.acceleration import Linear
from align.models.sampling.cache import STRETCH, KeyValues, Recorder
from align.models.sampling.choice import Sampling, penalised
from align.models.trunk import Trunk


class Response(NamedTuple):
    """What was sampled after one prompt."""

    tokens: np.ndarray  # (k,) int32, its end-of-turn token included where it has one
    ended: bool  # by an end-of-turn token or a stop text, not by its length
    logprobs: np.ndarray | None = None  # (k,) float32, as another engine that drew it told them


class Rows:
    """What stands after each row: `logits` (B, V) float32, over keys and values of all before."""

    def __init__(
        self, trunk: Trunk, project: Linear, prompts: list[np.ndarray], copies: int, sampling: Sampling
    ) -> None:
        """`copies` rows of each prompt, side by side; `project`: hidden states to logits."""
        self.trunk, self.project, self.sampling = trunk, project, sampling
        self.ends = torch.tensor(sorted(trunk.end_tokens), device=trunk.device)
        self.stop = (*sampling.stop, *turn_ends(trunk.tokenizer).texts)
        self.replayed = trunk.replayed
        self.replayed.renew()
        self.logits, self.kept = self._prompts(prompts, copies)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros_like(self.logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row * copies : (row + 1) * copies, torch.from_numpy(prompt).long()] = True

    def step(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """One more token a row, (B,). `rows` (B,): which of the rows so far go on so; one may do so several times."""
        if rows is not None:
            self.kept.keep(rows)
        if self.kept.make_room() or rows is not None:
            self.replayed.renew()
        if self.sampling.repetition_penalty != 1:
            self.seen = self.seen if rows is None else self.seen[rows]
            self.seen[self.kept.rows, tokens] = True
        self.logits = self.replayed(self._step, tokens)
        self.kept.longest += 1

    def _step(self, tokens: Tensor) -> Tensor:
        """(B,) -> (B, V): the same work at the same places, so that it can be replayed."""
        trunk, kept = self.trunk, self.kept
        kept.begin()
        with trunk.autocast():
            hidden = trunk.decoder(
                input_ids=tokens[:, None],
                position_ids=kept.lengths[:, None],
                past_key_values=kept,
                use_cache=True,
                kept=kept,
            ).last_hidden_state[:, 0]
        kept.grow()
        return self.project(hidden)

    def admitted(self, logits: Tensor, t: int) -> Tensor:
        """(B, V) as they are after t tokens: what was said is penalised, and nothing ends before its time."""
        if self.sampling.repetition_penalty != 1:
            logits = penalised(logits, self.seen, self.sampling.repetition_penalty)
        if t < self.sampling.min_new:
            logits = logits.index_fill(1, self.ends, -torch.inf)
        return logits

    def stopped(self, said: Tensor | np.ndarray) -> bool:
        """Whether a response, (t,) of its tokens, has just said a stop text."""
        return len(said) >= self.sampling.min_new and says_one(self.trunk.tokenizer, said, self.stop)

    def _prompts(self, prompts: list[np.ndarray], copies: int) -> tuple[Tensor, KeyValues]:
        """Logits after each prompt, (B, V), and its keys and values, for every one of its rows."""
        more = self.sampling.max_new if self.replayed.recorder and self.sampling.beams == 1 else STRETCH
        kept = KeyValues([len(prompt) for prompt in prompts for _ in range(copies)], more, self.trunk.device)
        logits, first = [], 0
        for part in _passes(prompts, self.trunk.budgets.prompt_tokens):
            recorder = Recorder()
            logits.append(self.project(self._pass(part, recorder)))
            edges = np.cumsum([0, *(len(prompt) for prompt in part)])
            kept.take(recorder, first, [(int(a), int(b)) for a, b in pairwise(edges) for _ in range(copies)])
            first += len(part) * copies
        return torch.cat(logits).repeat_interleave(copies, 0), kept

    def _pass(self, prompts: list[np.ndarray], recorder: Recorder) -> Tensor:
        """Final hidden state of each of n prompts, (n, d), in one packed row."""
        trunk = self.trunk
        trees = [Tree((prompt.astype(np.int32),), (np.zeros(len(prompt), bool),)) for prompt in prompts]
        forest = plant(trees, multiple=trunk.row_multiple).to(trunk.device)
        with trunk.autocast():
            return trunk.decoder(
                input_ids=forest.tokens,
                position_ids=forest.positions,
                past_key_values=recorder,
                use_cache=True,
                forest=trunk.mask(forest),
            ).last_hidden_state[0, forest.ends]


def says_one(tokenizer: PreTrainedTokenizerBase, said: Tensor | np.ndarray, texts: Sequence[str]) -> bool:
    """Whether a response, (t,) of its tokens, has just said one of these texts, one or more."""
    tail = tokenizer.decode(said[-max(map(len, texts)) - 1 :])
    return any(text in tail for text in texts)


def _passes(prompts: list[np.ndarray], most: int) -> Iterator[list[np.ndarray]]:
    """Prompts in their order, as many at once as have `most` tokens; one at least."""
    part, tokens = [], 0
    for prompt in prompts:
        if part and tokens + len(prompt) > most:
            yield part
            part, tokens = [], 0
        part.append(prompt)
        tokens += len(prompt)
    if part:
        yield part
