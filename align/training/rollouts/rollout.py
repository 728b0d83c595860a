"""Rollouts: responses to prompts, and what every role says of them.

Every process samples and scores its share, and then holds the numbers of all: what follows from them (rewards,
advantages, whitening) is computed everywhere alike.

Shapes: E episodes (responses, those of one prompt side by side), T tokens of the longest; a response of k tokens has
k + 1 steps: before each token, and after the last. n labels, P paths and S = n + P steps of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import Annotated, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.data.templates.texts import decoded
from align.data.trees import Forest, Tree
from align.models.roles import Entropy, Roles, Said, Scorers
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import Heed, Response, sample
from align.models.trunk import Trunk
from align.objectives.losses import path_counts
from align.recipe.errors import UserError
from align.recipe.schema import PositiveInt, Section
from align.training.batches import Batches
from align.training.borders.processes import gathered
from align.training.screen import Screen


class Generation(Section):
    """How responses are drawn."""

    max_new: PositiveInt = 64
    """Most tokens of a response, its end-of-turn token included."""
    min_new: Annotated[int, Field(ge=0)] = 0
    """No end before so many."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it, for policy and reference alike."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k likeliest tokens; 0 takes all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together hold this share (arXiv 1904.09751)."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only tokens with this share of the likeliest's probability (arXiv 2407.01082)."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Logits of what was said are divided by it (arXiv 1909.05858)."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end a response; they stay in it."""

    @model_validator(mode="after")
    def _can_end(self) -> Generation:
        if self.min_new > self.max_new:
            raise ValueError(f"`min_new`: {self.min_new:,} is more than `max_new`, {self.max_new:,}")
        return self

    @property
    def sampling(self) -> Sampling:
        """The same for the sampling engine."""
        return Sampling(**{**self.model_dump(), "stop": tuple(self.stop)})


class Episodes:
    """Prompts with their responses, as examples of which rows are made: one tree a prompt."""

    def __init__(self, prompts: Sequence[np.ndarray], responses: Sequence[Sequence[Response]]) -> None:
        """Prompts (l,) int32; of each one response or more, which are numbered prompt by prompt."""
        self.prompts, self.responses = prompts, responses
        self.samples = len(responses[0])  # to each prompt, where none is left out
        said = [[len(response.tokens) for response in own] for own in responses]
        self.lengths = np.array([len(p) + sum(k) for p, k in zip(prompts, said, strict=True)], np.int64)
        self.longest = np.array([len(p) + max(k) for p, k in zip(prompts, said, strict=True)], np.int64)
        self.paths = np.array([len(own) for own in responses], np.int64)
        self.firsts = np.cumsum(self.paths) - self.paths  # the number of each prompt's first response
        self.room = self.lengths + self.paths - 1
        self.flat = [response for own in responses for response in own]  # by number
        self.said = torch.tensor([len(response.tokens) for response in self.flat])  # (E,) int64
        self.ended = torch.tensor([response.ended for response in self.flat])  # (E,) bool

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def engine_logprobs(self) -> Tensor | None:
        """(E, T) float32, 0 behind each end; None where the own engine drew them."""
        told = [response.logprobs for response in self.flat]
        if any(logprobs is None for logprobs in told):
            return None
        return pad_sequence([torch.from_numpy(logprobs) for logprobs in told], batch_first=True)

    def numbers(self, group: np.ndarray) -> np.ndarray:
        """The episodes of a group of prompts, (k,) -> (e,) int64."""
        return np.concatenate([self.firsts[i] + np.arange(self.paths[i]) for i in group])

    def kept(self, chosen: Tensor) -> Episodes:
        """Some of the episodes, (E,) bool, and their prompts."""
        flags = np.split(chosen.numpy(), self.firsts[1:])
        left = [list(compress(own, flag)) for own, flag in zip(self.responses, flags, strict=True)]
        return Episodes([*compress(self.prompts, left)], [*filter(None, left)])

    def replaced(self, group: np.ndarray, anew: Episodes) -> Episodes:
        """With other responses to some prompts, (k,) int64."""
        responses = list(self.responses)
        for i, own in zip(group, anew.responses, strict=True):
            responses[i] = own
        return Episodes(self.prompts, responses)

    def tree(self, i: int) -> Tree:
        """Prompt `i` with its responses as branches, all of their tokens labels; targets are episodes' numbers."""
        stem, branches = self.prompts[i], [response.tokens for response in self.responses[i]]
        marks = (np.zeros(len(stem), bool), *(np.ones(len(branch), bool) for branch in branches))
        return Tree((stem, *branches), marks, tuple(float(number) for number in self.numbers(np.array([i]))))


class Rollout(NamedTuple):
    """What the roles say of all episodes; float32 and 0 where masked, on the CPU."""

    logprobs: Tensor  # (E, T) of the actor that sampled
    ref_logprobs: Tensor | None  # (E, T); None where it was not asked
    entropies: Tensor  # (E, T) of the actor, in nats
    values: Tensor  # (E, T + 1) of the critic; 0 where it was not asked
    tokens: Tensor  # (E, T) bool, the policy's mask
    steps: Tensor  # (E, T + 1) bool, the values' mask: one longer
    lengths: Tensor  # (E,) int64, tokens of each
    said: Said | None = None  # of the only row there is, with its graph: nothing has to be said again to learn from it
    engine_logprobs: Tensor | None = None  # (E, T) of the engine that drew the tokens, where it is not this one
    importance: Tensor | None = None  # (E, T) what the policy loss of each token is multiplied by: 1 of the own engine
    mismatch: Mapping[str, float] = MappingProxyType({})  # figures of both engines, beside each other


def check_samples(trunk: Trunk) -> None:
    """UserError where the trunk cannot sample."""
    if not trunk.packed:
        why = trunk.layout_reason or "model.layout is padded"
        raise UserError(f"model.base: responses are sampled in the tree layout, which is not to be had: {why}")


def sampled(
    trunk: Trunk,
    batches: Batches,
    prompts: Sequence[np.ndarray],
    keys: Sequence[tuple[int, ...]],
    how: Sampling,
    n: int,
    heed: Heed | None = None,
) -> Episodes:
    """n responses to each prompt by the trunk's acting adapter; a response depends on its prompt and key alone.

    Where `heed` raises Stopped in one process, all raise it.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    mine = order[batches.rank :: batches.world]

    def own() -> dict[int, list[Response]]:
        said = sample(trunk, [prompts[i] for i in mine], how, [keys[i] for i in mine], n, heed) if mine else []
        return dict(zip(mine, said, strict=True))

    with trunk.whole():  # one process may have more to say than another
        found = {i: said for part in gathered(own) for i, said in part.items()}
    return Episodes(prompts, [found[i] for i in range(len(prompts))])


def texts(trunk: Trunk, episodes: Episodes) -> list[tuple[str, str]]:
    """Prompt and response of every episode, (E,), as text; an end of turn and special tokens are no part of it."""
    return [
        (decoded(trunk.tokenizer, prompt), trunk.said(prompt, response.tokens))
        for prompt, responses in zip(episodes.prompts, episodes.responses, strict=True)
        for response in responses
    ]


def scored(
    roles: Roles | Scorers,
    batches: Batches,
    episodes: Episodes,
    groups: Sequence[np.ndarray],
    scorers: Sequence[str],
    screen: Screen,
) -> dict[str, Tensor]:
    """Scores of all episodes by the reward roles, (E,) float32 each, at their ends; `groups` as in `read`."""
    if not scorers:
        return {}

    def numbers(forest: Forest) -> list[tuple[Tensor, ...]]:
        columns = [roles.scores(name, forest, forest.ends).cpu().split(1) for name in scorers]
        return list(zip(*columns, strict=True))

    columns = _by_episode(batches, episodes, groups, screen, numbers)
    return {name: torch.cat(column) for name, column in zip(scorers, columns, strict=True)}


def read(
    roles: Roles,
    batches: Batches,
    episodes: Episodes,
    groups: Sequence[np.ndarray],
    screen: Screen,
    to_learn: Entropy | None = None,
    reference: bool = True,
) -> Rollout:
    """What actor, critic and, if so asked, reference say, over packed trees, each prompt once.

    `groups` of prompts, (k,) int64 each, share rows as they will when they are trained on, so that the actor says
    again, to the bit, what it says here. `to_learn`: they are trained on next, with this entropy: the critic, if there
    is one, is asked too, and if there is but one row, `Rollout.said` is kept.
    """
    rows = [row for group in groups for row in batches.rows(episodes, group)]
    kept: list[Said] = []
    keeps = to_learn is not None and len(rows) == batches.world == 1

    def numbers(forest: Forest) -> list[tuple[Tensor, ...]]:
        with torch.set_grad_enabled(keeps):
            said = roles(forest, to_learn is not None, to_learn or "known")
        kept[:] = [said] * keeps
        counts = path_counts(forest.path, forest.paths).tolist()
        values = said.logprobs.new_zeros(len(said.logprobs) + forest.paths) if said.values is None else said.values
        bare = (roles.reference(forest),) if reference else ()
        columns = [part.detach().cpu().split(counts) for part in (said.logprobs, said.entropy, *bare)]
        columns.insert(2, values.detach().cpu().split([k + 1 for k in counts]))
        return list(zip(*columns, strict=True))

    columns = _by_episode(batches, episodes, groups, screen, numbers)
    logprobs, entropies, values, *bare = (pad_sequence(column, batch_first=True) for column in columns)
    steps = torch.arange(logprobs.shape[1] + 1) <= episodes.said[:, None]
    tokens, ref_logprobs = steps[:, 1:], bare[0] if bare else None
    return Rollout(
        logprobs, ref_logprobs, entropies, values, tokens, steps, episodes.said, kept[0] if kept else None,
        episodes.engine_logprobs, tokens.float(),
    )  # fmt: skip


def _by_episode(
    batches: Batches,
    episodes: Episodes,
    groups: Sequence[np.ndarray],
    screen: Screen,
    numbers: Callable[[Forest], list[tuple[Tensor, ...]]],
) -> list[tuple[Tensor, ...]]:
    """`numbers` of each path of a batch, (…,) each, as columns over all episodes, on every process."""
    rows = [row for group in groups for row in batches.rows(episodes, group)]
    mine: dict[int, tuple[Tensor, ...]] = {}
    with torch.no_grad(), screen.at_once():
        for row in screen.track(rows, "scoring"):
            forest = batches.plant(episodes, row)
            found = numbers(forest)
            mine |= dict(zip(forest.targets.long().tolist(), found, strict=True)) if row else {}
    known = {number: parts for part in gather_object([mine]) for number, parts in part.items()}
    return list(zip(*(known[number] for number in range(len(episodes.flat))), strict=True))


def minibatches(prompts: int, count: int, key: Sequence[int]) -> list[np.ndarray]:
    """The prompts of a pass in an order that the key fixes, as so many groups."""
    return np.array_split(np.random.default_rng(list(key)).permutation(prompts), min(count, prompts))


def score_figures(parts: dict[str, Tensor], score: Tensor, episodes: Episodes) -> dict[str, float | None]:
    """Means over episodes, of scores over those that are known; `parts` and `score` (E,) each."""

    def mean(of: Tensor) -> float | None:
        known = of[~of.isnan()]
        return float(known.mean()) if len(known) else None

    return {
        "score": mean(score),
        **{f"score/{name}": mean(part) for name, part in parts.items()},
        "response_tokens": float(episodes.said.sum()) / len(score),
        "ended": float(episodes.ended.float().mean()),
    }


def figures(rollout: Rollout, kl_coef: float, score: float) -> dict[str, float]:
    """Means over a rollout's episodes, or over their real tokens; `score` is the mean of theirs. Nothing of KL where
    the reference was not asked."""
    tokens, count = float(rollout.lengths.sum()), len(rollout.lengths)
    found = {"entropy": float(rollout.entropies.sum()) / tokens}
    if rollout.ref_logprobs is not None:
        kl = float((rollout.logprobs - rollout.ref_logprobs).sum())
        found |= {"kl": kl / count, "kl_per_token": kl / tokens, "kl_coef": kl_coef}
        found["reward"] = score - kl_coef * kl / count
    return found | rollout.mismatch


def explained(rollout: Rollout, returns: Tensor) -> dict[str, float | None]:
    """Of the returns (E, T + 1), what the critic knew before it learns from them; where they do not vary beyond
    rounding there is nothing to explain, and the share is None."""
    real, values = returns[rollout.steps].double(), rollout.values[rollout.steps].double()
    rounding = 1e-6 * max(1e-6, float(real.abs().max()), float(values.abs().max()))  # returns are sums in float32
    spread = float(real.var(correction=0)) ** 0.5
    return {
        "explained_variance": 1 - float((real - values).var(correction=0)) / spread**2 if spread > rounding else None,
        "value/return": float(real.mean()),
        "value/critic": float(values.mean()),
    }
