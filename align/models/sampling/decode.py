"""Sampling from the trunk: prompts computed once in packed rows, then one token a step for all rows still going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from align.data.formats.prompts import prompts as prompting
from align.data.formats.rows import Fault, Row
from align.models import acceleration
from align.models.acceleration import Linear
from align.models.sampling.beams import search
from align.models.sampling.cache import NAME as DECODE
from align.models.sampling.choice import Sampling, draw, filtered, uniforms
from align.models.sampling.rows import Response, Rows
from align.models.trunk import Trunk
from align.recipe.errors import UserError

Heed = Callable[[list[int]], None]
FEW_ROWS = 16  # that products are prepared for
LOOK = {"cpu": 1, "cuda": 8}  # tokens after which the host sees what was said: on a GPU it would wait each time
LEAVE = {"cpu": 0.75, "cuda": 0.5}  # rows that are done leave when no more than this share goes on


def sample(
    trunk: Trunk,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    keys: Sequence[tuple[int, ...]],
    samples: int = 1,
    heed: Heed | None = None,
) -> list[list[Response]]:
    """`samples` responses to each prompt, (l,) int32 token ids, one or more; with beams the best, best first.

    A response depends on the prompt, its key and its number among the samples, not on the other prompts: its draws
    are `uniforms((*key, number))`. `heed` is told at each step what the rows that go on have just said, none if that
    is not certain yet; what it raises ends the sampling.
    """
    assert len(prompts) == len(keys)
    assert all(len(prompt) for prompt in prompts)
    assert sampling.beams == 1 or sampling.temperature == 0, "a search draws nothing"
    assert sampling.beams == 1 or samples <= sampling.beams, (samples, sampling.beams)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    responses: list[list[Response]] = [[] for _ in prompts]
    with torch.no_grad(), evaluating(trunk), acceleration.for_sampling(trunk, FEW_ROWS):
        project = projection(trunk)
        room = trunk.budgets.cache_tokens
        for group in _groups(order, prompts, sampling.max_new, max(samples, sampling.beams), room):
            found = _together(
                trunk, project, [prompts[i] for i in group], [keys[i] for i in group], sampling, samples, heed
            )
            for i, own in zip(group, found, strict=True):
                responses[i] = own[:samples]
    return responses


def _together(
    trunk: Trunk,
    project: Linear,
    asked: list[np.ndarray],
    keys: list[tuple[int, ...]],
    sampling: Sampling,
    samples: int,
    heed: Heed | None,
) -> list[list[Response]]:
    """Responses to a group of prompts. What is kept of them is gone when the next group begins."""
    if sampling.beams > 1:
        rows = Rows(trunk, project, asked, 1, sampling)
        with trunk.attending(DECODE):
            return search(rows, len(asked), heed)
    drawn = np.stack([uniforms((*key, number), sampling.max_new) for key in keys for number in range(samples)])
    draws = _Draws(Rows(trunk, project, asked, samples, sampling), drawn, heed)
    with trunk.attending(DECODE):
        flat = draws.run()
    return [flat[first : first + samples] for first in range(0, len(flat), samples)]


def answer(trunk: Trunk, prompt: str, most: int, written_as: Literal["chat", "text"], heed: Heed | None = None) -> str:
    """The greedy answer to one user turn, or continuation of a text, of at most `most` tokens. `heed`: see `sample`.

    Raises UserError for a prompt that cannot be written.
    """
    ids = asked_ids(trunk.tokenizer, prompt, written_as)
    if trunk.packed:
        ((response,),) = sample(trunk, [ids], Sampling(most, temperature=0), [(0,)], heed=heed)
        return trunk.said(ids, response.tokens).strip()
    with trunk.generating() as model:  # layers that keep another state than keys and values
        inputs = torch.tensor(ids[None], dtype=torch.long, device=trunk.device)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=trunk.tokenizer.pad_token_id,
            tokenizer=trunk.tokenizer,
            stopping_criteria=[_Heeding(heed)] if heed else None,
        )
    return trunk.said(ids, out[0, len(ids) :].tolist()).strip()


class _Heeding(StoppingCriteria):
    """Lets `heed` end transformers' own sampling; ends nothing by itself."""

    def __init__(self, heed: Heed) -> None:
        self.heed = heed

    def __call__(self, input_ids: Tensor, scores: Tensor, **_more: object) -> Tensor:  # (B, l) -> (B,) bool
        self.heed(input_ids[:, -1].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def asked_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, written_as: Literal["chat", "text"]) -> np.ndarray:
    """One user turn, up to where the answer begins, or a text that is continued: (l,) int32.

    Raises UserError for one that cannot be written.
    """
    asked = [{"role": "user", "content": prompt}] if written_as == "chat" else None
    (tree,) = prompting().render([Row("", 0, asked, None if asked else prompt, None)], tokenizer)
    if isinstance(tree, Fault):
        raise UserError(f"log.samples: {tree.reason}")
    return tree.segments[0]


class _Draws:
    """The responses that are drawn at once. The host looks at them every few tokens: until then a row that has ended
    goes on, and what it says after its end is cut off."""

    def __init__(self, rows: Rows, drawn: np.ndarray, heed: Heed | None) -> None:
        """`drawn`: (B, max_new) float64."""
        self.rows, self.sampling, self.heed = rows, rows.sampling, heed
        device = rows.logits.device
        self.drawn = torch.from_numpy(drawn).to(device)
        self.said = torch.zeros(drawn.shape, dtype=torch.long, device=device)
        self.active = torch.arange(len(drawn), device=device)  # rows of `said` that are computed
        # The same for the host, as far as it has looked.
        self.ends, self.seen = rows.ends.cpu().numpy(), 0
        self.heard = np.zeros(drawn.shape, np.int32)
        self.numbers = np.arange(len(drawn))  # of the active rows
        self.lengths = np.full(len(drawn), self.sampling.max_new)
        self.ended = np.zeros(len(drawn), bool)

    def run(self) -> list[Response]:
        """Every row to its end."""
        every = LOOK.get(self.active.device.type, LOOK["cuda"])
        for t in range(self.sampling.max_new):
            tokens = self._next(t)
            self.said[self.active, t] = tokens
            rows = None
            if (t + 1) % every == 0 or t + 1 == self.sampling.max_new:
                self._look(t + 1)
                going = ~self.ended[self.numbers]
                if not going.any() or t + 1 == self.sampling.max_new:
                    break
                if going.mean() <= LEAVE.get(self.active.device.type, LEAVE["cuda"]):
                    self.numbers = self.numbers[going]
                    rows = torch.from_numpy(going.nonzero()[0]).to(tokens.device)
                    self.active, tokens = self.active[rows], tokens[rows]
            self.rows.step(tokens, rows)
        return [
            Response(row[:length].copy(), bool(ended))
            for row, length, ended in zip(self.heard, self.lengths, self.ended, strict=True)
        ]

    def _next(self, t: int) -> Tensor:
        logits = self.rows.admitted(self.rows.logits, t)
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        return draw(filtered(logits, self.sampling), self.drawn[self.active, t])

    def _look(self, t: int) -> None:
        """What was said up to token t: notes where rows ended, and tells what they said until then."""
        first, self.seen = self.seen, t
        self.heard[self.numbers, first:t] = self.said[self.active, first:t].cpu().numpy()
        for step in range(first, t):
            going = self.numbers[~self.ended[self.numbers]]
            tokens = self.heard[going, step]
            over = np.isin(tokens, self.ends)
            if self.rows.stop:
                over |= np.array([self.rows.stopped(self.heard[row, : step + 1]) for row in going], bool)
            self.ended[going[over]], self.lengths[going[over]] = True, step + 1
            if self.heed and len(going):
                self.heed(tokens.tolist())


def projection(trunk: Trunk) -> Linear:
    """Final hidden states (B, d) -> logits (B, V) float32."""
    head = trunk.projection()
    product, scale, cap = acceleration.prepared(head["weight"], head["bias"], FEW_ROWS), head["scale"], head["softcap"]

    def project(hidden: Tensor) -> Tensor:
        logits = product(hidden.to(trunk.dtype)).float() * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return project


def _groups(
    order: list[int], prompts: Sequence[np.ndarray], max_new: int, samples: int, budget: int
) -> Iterator[list[int]]:
    """Prompts of like length together, as many as there is room for: a budget of kept tokens."""
    group, room = [], 0
    for i in order:
        room = room or len(prompts[i]) + max_new  # the first of a group is its longest
        if group and (len(group) + 1) * samples * room > budget:
            yield group
            group, room = [], len(prompts[i]) + max_new
        group.append(i)
    if group:
        yield group


@contextmanager
def evaluating(trunk: Trunk) -> Iterator[None]:
    """Without dropout for a while."""
    training = trunk.training
    trunk.eval()
    try:
        yield
    finally:
        trunk.replayed.renew()  # what was recorded holds memory
        trunk.train(training)
