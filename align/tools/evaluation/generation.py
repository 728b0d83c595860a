"""Responses of a policy to prompts, and what policy, reference and reward models say of each.

Shapes: n prompts, s samples of each, P paths (responses) of one batch, K scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from align.data.examples import Examples
from align.data.formats.prompts import Asked
from align.data.trees import Forest
from align.models.roles import Roles
from align.models.sampling.choice import Sampling
from align.models.trunk import Trunk
from align.objectives.logprobs import linear_entropy, linear_kl, linear_logprobs
from align.objectives.losses import path_sums
from align.recipe.schema import PositiveInt
from align.training.batches import Batches
from align.training.borders.stops import Signals
from align.training.rollouts.parts import Answered
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import Episodes, Generation, sampled, texts
from align.training.screen import Screen

SUMS = ("logprob", "ref_logprob", "kl", "entropy")  # over a response's tokens, in nats


class Answering(Generation):
    """How responses are found."""

    beams: PositiveInt = 1
    """Above 1 nothing is drawn: the likeliest responses that a search with so many beams finds."""
    length_penalty: float = 1.0
    """With `beams`: responses compare by log-probability / length^this."""

    @model_validator(mode="after")
    def _draws_or_searches(self) -> Answering:
        drawn = (self.temperature, self.top_k, self.top_p, self.min_p)
        if self.beams > 1 and drawn != (1.0, 0, 1.0, 0.0):
            raise ValueError("a search with `beams` draws nothing: leave temperature, top_k, top_p and min_p out")
        if self.beams == 1 and self.length_penalty != 1:
            raise ValueError("`length_penalty` is of `beams`, of which there is one")
        return self

    @property
    def sampling(self) -> Sampling:
        """The same for the sampling engine."""
        how = super().sampling
        return how._replace(temperature=0) if self.beams > 1 else how


class Prompts(NamedTuple):
    """Prompts, each once, in the order of the data."""

    chosen: np.ndarray  # (n,) int64, the first example of each
    stems: list[np.ndarray]  # each (l,) int32 token ids
    keys: list[str]  # hashes of them
    repeated: int  # examples whose prompt stood in an earlier one

    @property
    def key(self) -> str:
        """The hash of all, in order."""
        return blake2b(" ".join(self.keys).encode(), digest_size=8).hexdigest()


class Responses(NamedTuple):
    """What was sampled, and what is said of it; a score that is not a number is a judge that failed."""

    episodes: Episodes
    answered: list[Answered]  # (n s,)
    figures: dict[str, np.ndarray]  # (n, s) float64 each: SUMS, tokens, ended
    scores: dict[str, np.ndarray]  # (n, s) float64 each


def distinct_prompts(examples: Examples) -> Prompts:
    """Each prompt once: it is the unit of chance, and its responses depend on it alone."""
    stems = [examples.tree(i).segments[0] for i in range(len(examples))]
    keys = [blake2b(np.asarray(stem, np.int32).tobytes(), digest_size=8).hexdigest() for stem in stems]
    first = {key: i for i, key in reversed([*enumerate(keys)])}
    chosen = np.array(sorted(first.values()), np.int64)
    return Prompts(chosen, [stems[i] for i in chosen], [keys[i] for i in chosen], len(keys) - len(chosen))


def respond(
    roles: Roles,
    rewards: Rewards,
    batches: Batches,
    prompts: Prompts,
    rows: Sequence[Asked],
    how: Generation,
    samples: int,
    seed: int,
    screen: Screen,
    signals: Signals,
) -> Responses:
    """`samples` responses to each prompt, which depend on seed, prompt and their number alone; and their scores.

    `rows`: (n,), what each prompt was made of.
    """
    trunk, shape = roles.trunk, (len(prompts.stems), samples)
    keys = [(seed, int(key, 16)) for key in prompts.keys]
    episodes = sampled(trunk, batches, prompts.stems, keys, how.sampling, samples)
    every, scorers = np.arange(len(episodes)), [*rewards.scorers]
    lines = batches.each(episodes, every, said_by(roles, scorers), screen, "scoring")
    columns = torch.stack(lines).double().permute(2, 0, 1).numpy()  # (4 + K, n, s)
    figures = dict(zip(SUMS, columns, strict=False)) | {
        "tokens": np.array([len(response.tokens) for response in episodes.flat], np.float64).reshape(shape),
        "ended": np.array([response.ended for response in episodes.flat], np.float64).reshape(shape),
    }
    pairs = iter(texts(trunk, episodes))
    answered = [Answered(row, *next(pairs)) for row in rows for _ in range(samples)]
    told = rewards.of_texts(answered, batches.rank, batches.world, signals)
    scores = dict(zip(scorers, columns[len(SUMS) :], strict=True))
    scores |= {name: score.double().numpy().reshape(shape) for name, score in told.items()}
    return Responses(episodes, answered, figures, {name: scores[name] for name in rewards.parts})


def said_by(roles: Roles, scorers: Sequence[str]) -> Callable[[Trunk, Forest], Tensor]:
    """What `Batches.each` is to ask of every response: SUMS and the scores, (P, 4 + K) float32."""

    def numbers(trunk: Trunk, forest: Forest) -> Tensor:
        head = trunk.projection(roles.temperature)
        states = trunk.states(forest)
        with trunk.acting(None):
            reference = trunk.states(forest)
        of_tokens = (
            linear_logprobs(states, labels=forest.labels, **head),
            linear_logprobs(reference, labels=forest.labels, **head),
            linear_kl(states, reference, **head),
            linear_entropy(states, **head),
        )
        sums = [path_sums(part, forest.path, forest.paths).float() for part in of_tokens]
        return torch.stack(sums + [roles.scores(name, forest, forest.ends) for name in scorers], 1)

    return numbers
