"""The measures of an evaluated policy, each a mean with its interval.

The unit of chance is the prompt, as in `align.compare`, and the intervals are the same. Shapes: n prompts, s samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.data.examples import Examples, joined
from align.data.trees import Forest
from align.models.roles import Roles
from align.models.trunk import Trunk
from align.objectives.losses import path_sums
from align.tools.evaluation.generation import Responses
from align.training.batches import Batches
from align.training.bootstrap import Draws, Estimate, estimate, mean, per_prompt
from align.training.meters import wins
from align.training.screen import Screen

# ------------------------------------------------------------------------------------------------- the responses


def measures(responses: Responses, draws: Draws) -> dict[str, Estimate]:
    """Of all responses: a mean over a prompt's samples first, then over prompts."""
    found, tokens = responses.figures, responses.figures["tokens"]
    shape = tokens.shape
    said = np.empty(shape, object)
    for number, response in enumerate(responses.episodes.flat):
        said[np.unravel_index(number, shape)] = response.tokens.tolist()
    columns = {f"score/{name}": score for name, score in responses.scores.items()} | {
        "kl": found["kl"],
        "kl_sequence": found["logprob"] - found["ref_logprob"],
        "response_tokens": tokens,
        "ended": found["ended"],
        "repetition": np.array([[repetition(one) for one in own] for own in said]),
    }
    told = {name: mean(per_prompt(_finite(column)), draws) for name, column in columns.items()}
    told["kl_per_token"] = ratio(found["kl"].sum(1), tokens.sum(1), draws)
    told["entropy"] = ratio(found["entropy"].sum(1), tokens.sum(1), draws)
    for n in (1, 2):
        told[f"distinct_{n}"] = mean(np.array([distinct(own, n) for own in said]), draws)
    return told


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of a prompt's responses over all of them (Li et al. 2016, arXiv 1510.03055); nan of none."""
    grams = [gram for said in responses for gram in _grams(said, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(said: Sequence[int], n: int = 4) -> float:
    """The share of a response's n-grams that stood in it before; 0 where it has none."""
    grams = _grams(said, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(said: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


def _finite(column: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(column), column, np.nan)


def ratio(sums: np.ndarray, counts: np.ndarray, draws: Draws) -> Estimate:
    """sum / count over all prompts, (n,) each, as perplexity takes the mean over all tokens."""
    there = counts > 0
    sums, counts = sums[there], counts[there]
    return estimate(lambda weights: (weights @ sums) / (weights @ counts), np.ones(len(sums), bool), draws)


# ------------------------------------------------------------------------------------------------- known answers


def perplexity(batches: Batches, examples: Examples, screen: Screen, draws: Draws) -> Estimate:
    """exp(-mean log p) over all labels, prompts drawn whole."""

    def numbers(trunk: Trunk, forest: Forest) -> Tensor:
        return path_sums(trunk(forest), forest.path, forest.paths)

    lines = batches.each(examples, np.arange(len(examples)), numbers, screen, "perplexity")
    nll = np.array([-float(line.double().sum()) for line in lines])
    found = ratio(*_by_prompt(examples, nll, examples.labels), draws)
    return Estimate(*map(math.exp, found[:3]), found.n)


def accuracies(
    roles: Roles, scorers: Sequence[str], batches: Batches, examples: Examples, screen: Screen, draws: Draws
) -> dict[str, Estimate]:
    """Of each score on this trunk: the share of pairs whose better answer it puts first, a tie one half."""
    if not scorers:
        return {}

    def numbers(_trunk: Trunk, forest: Forest) -> Tensor:
        return torch.stack([roles.scores(name, forest, forest.ends) for name in scorers], 1)

    lines = batches.each(examples, np.arange(len(examples)), numbers, screen, "scoring pairs")
    told = {}
    for k, name in enumerate(scorers):
        right, pairs = [], []
        for line in lines:  # (P, K), the best answer first
            better, worse = torch.triu_indices(len(line), len(line), 1)
            right.append(float(wins(line[better, k], line[worse, k]).sum()))
            pairs.append(len(better))
        told[name] = ratio(*_by_prompt(examples, np.array(right), np.array(pairs)), draws)
    return told


def _by_prompt(examples: Examples, *columns: np.ndarray) -> list[np.ndarray]:
    """Sums over the rows of each prompt, (n,) float64 each."""
    prompts = joined([part.store.prompt[part.rows] for part in examples.parts])
    _, which = np.unique(prompts, return_inverse=True)
    return [np.bincount(which, column.astype(np.float64)) for column in columns]
