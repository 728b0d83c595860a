"""Sampling from the trunk: prompts computed once in packed rows, then one token a step for all rows still going on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.data.trees import Tree, plant
from align.models.attention import ForestMask
from align.models.cache import NAME as DECODE
from align.models.cache import KeyValues, Recorder
from align.models.fused import fixed_products
from align.models.packed import Linear, prepared
from align.models.sampling import Sampling, draw, filtered, penalised, uniforms
from align.models.trunk import Trunk

KEPT_TOKENS = {"cpu": 32_768, "cuda": 1_048_576}  # of all rows that are sampled at once
FEW_ROWS = 16  # that products are prepared for
LEAVE = 0.75  # rows that are done leave when no more than this share goes on


class Response(NamedTuple):
    """What was sampled after one prompt."""

    tokens: np.ndarray  # (k,) int32, its end-of-turn token included where it has one
    ended: bool  # by an end-of-turn token or a stop text, not by its length


def sample(
    trunk: Trunk, prompts: Sequence[np.ndarray], sampling: Sampling, keys: Sequence[tuple[int, ...]], samples: int = 1
) -> list[list[Response]]:
    """`samples` responses to each prompt, (l,) int32 token ids, one or more.

    A response depends on the prompt, its key and its number among the samples, not on the other prompts: its draws
    are `uniforms((*key, number))`.
    """
    assert len(prompts) == len(keys)
    assert all(len(prompt) for prompt in prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    responses: list[list[Response]] = [[] for _ in prompts]
    with torch.no_grad(), _evaluating(trunk), fixed_products(trunk, FEW_ROWS):
        project = _projection(trunk)
        for group in _groups(order, prompts, sampling.max_new, samples, trunk.device.type):
            rows = [(i, number) for i in group for number in range(samples)]
            drawn = np.stack([uniforms((*keys[i], number), sampling.max_new) for i, number in rows])
            batch = _Batch(trunk, project, [prompts[i] for i in group], samples, sampling, drawn)
            with trunk.attending(DECODE):
                found = batch.run()
            for (i, _), response in zip(rows, found, strict=True):
                responses[i].append(response)
    return responses


def answer(trunk: Trunk, prompt: str, most: int, written_as: Literal["chat", "text"]) -> str:
    """The greedy answer to one user turn, or continuation of a text, of at most `most` tokens."""
    tokenizer = trunk.tokenizer
    if written_as == "chat":
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=written_as == "text")["input_ids"]
    if trunk.packed:
        ((response,),) = sample(trunk, [np.array(ids, np.int32)], Sampling(most, temperature=0), [(0,)])
        return tokenizer.decode(response.tokens, skip_special_tokens=True).strip()
    with trunk.generating() as model:  # layers that keep another state than keys and values
        inputs = torch.tensor([ids], device=trunk.device)
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=most, do_sample=False, **ends
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


class _Batch:
    """The rows that are sampled at once; `active` are those that go on."""

    def __init__(
        self,
        trunk: Trunk,
        project: Linear,
        prompts: list[np.ndarray],
        samples: int,
        sampling: Sampling,
        drawn: np.ndarray,
    ) -> None:
        """`project`: hidden states to logits."""
        self.trunk, self.project, self.sampling = trunk, project, sampling
        self.drawn = torch.from_numpy(drawn).to(trunk.device)  # (B, max_new) float64
        self.ends = torch.tensor(sorted(end_tokens(trunk)), device=trunk.device)
        self.logits, self.kept = self._prompts(prompts, samples)
        self.active = torch.arange(len(self.logits), device=trunk.device)  # rows of `said`
        self.said = torch.zeros(len(self.logits), sampling.max_new, dtype=torch.long, device=trunk.device)
        self.lengths = [sampling.max_new] * len(self.logits)
        self.ended = [False] * len(self.logits)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros_like(self.logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row * samples : (row + 1) * samples, torch.from_numpy(prompt).long()] = True

    def run(self) -> list[Response]:
        """Every row to its end."""
        for t in range(self.sampling.max_new):
            tokens = self._next(t)
            self.said[self.active, t] = tokens
            going = torch.tensor(self._unfinished(tokens, t), device=tokens.device, dtype=torch.bool)
            if not going.any():
                break
            if going.float().mean() <= LEAVE:
                rows = going.nonzero()[:, 0]
                self.kept.keep(rows)
                self.active, tokens = self.active[rows], tokens[rows]
            if t + 1 < self.sampling.max_new:
                self.logits = self._step(tokens)
        said = self.said.cpu().numpy().astype(np.int32)
        return [
            Response(row[:length], ended) for row, length, ended in zip(said, self.lengths, self.ended, strict=True)
        ]

    def _prompts(self, prompts: list[np.ndarray], samples: int) -> tuple[Tensor, KeyValues]:
        """Logits after each prompt, (B, V) float32, and its keys and values, for every one of its samples."""
        trunk = self.trunk
        trees = [Tree((prompt.astype(np.int32),), (np.zeros(len(prompt), bool),)) for prompt in prompts]
        forest = plant(trees, multiple=trunk.row_multiple).to(trunk.device)
        recorder = Recorder()
        with trunk.autocast():
            hidden = trunk.decoder(
                input_ids=forest.tokens,
                position_ids=forest.positions,
                past_key_values=recorder,
                use_cache=True,
                forest=ForestMask(forest),
            ).last_hidden_state[0, forest.ends]
        edges = np.cumsum([0, *(len(prompt) for prompt in prompts)])
        spans = [(int(a), int(b)) for a, b in pairwise(edges) for _ in range(samples)]
        return self.project(hidden).repeat_interleave(samples, 0), KeyValues(recorder, spans)

    def _step(self, tokens: Tensor) -> Tensor:
        """One more token a row, (B,) -> logits (B, V)."""
        trunk, kept = self.trunk, self.kept
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

    def _next(self, t: int) -> Tensor:
        logits, sampling = self.logits, self.sampling
        if sampling.repetition_penalty != 1:
            logits = penalised(logits, self.seen[self.active], sampling.repetition_penalty)
        if t < sampling.min_new:
            logits = logits.index_fill(1, self.ends, -torch.inf)
        if sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(filtered(logits, sampling), self.drawn[self.active, t])
        if sampling.repetition_penalty != 1:
            self.seen[self.active, tokens] = True
        return tokens

    def _unfinished(self, tokens: Tensor, t: int) -> list[bool]:
        """For every active row whether it goes on; notes where the others ended."""
        going = []
        over = torch.isin(tokens, self.ends).tolist()
        for row, done in zip(self.active.tolist(), over, strict=True):
            if not self.ended[row] and (done or self._stopped(row, t)):
                self.ended[row], self.lengths[row] = True, t + 1
            going.append(not self.ended[row])
        return going

    def _stopped(self, row: int, t: int) -> bool:
        """Whether a stop text has just been said."""
        if not self.sampling.stop or t + 1 < self.sampling.min_new:
            return False
        longest = max(map(len, self.sampling.stop))
        tail = self.trunk.tokenizer.decode(self.said[row, max(0, t - longest) : t + 1])
        return any(stop in tail for stop in self.sampling.stop)


def _projection(trunk: Trunk) -> Linear:
    """Final hidden states (B, d) -> logits (B, V) float32."""
    head = trunk.projection()
    product, scale, cap = prepared(head["weight"], head["bias"], FEW_ROWS), head["scale"], head["softcap"]

    def project(hidden: Tensor) -> Tensor:
        logits = product(hidden.to(trunk.dtype)).float() * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return project


def end_tokens(trunk: Trunk) -> set[int]:
    """What ends a response: the tokenizer's end-of-turn token, and those that the base names besides."""
    named = getattr(trunk.plain.generation_config, "eos_token_id", None)
    return {trunk.tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or [])}


def _groups(
    order: list[int], prompts: Sequence[np.ndarray], max_new: int, samples: int, device: str
) -> Iterator[list[int]]:
    """Prompts of like length together, as many as there is room for."""
    budget, group, room = KEPT_TOKENS.get(device, KEPT_TOKENS["cuda"]), [], 0
    for i in order:
        room = room or len(prompts[i]) + max_new  # the first of a group is its longest
        if group and (len(group) + 1) * samples * room > budget:
            yield group
            group, room = [], len(prompts[i]) + max_new
        group.append(i)
    if group:
        yield group


@contextmanager
def _evaluating(trunk: Trunk) -> Iterator[None]:
    training = trunk.training
    trunk.eval()
    try:
        yield
    finally:
        trunk.train(training)
