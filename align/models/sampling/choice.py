"""How the next token is chosen from logits: filters of the distribution, and draws that a seed fixes.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256  # tokens of the vocabulary whose shares are summed first


class Sampling(NamedTuple):
    """What a response may be. The defaults draw from the model's own distribution."""

    max_new: int  # most tokens of a response, its end-of-turn token included
    min_new: int = 0  # no end before so many
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together hold this share (Holtzman et al. 2019, arXiv 1904.09751)
    min_p: float = 0.0  # only those with this share of the likeliest's probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # logits of what was said are divided by it (Keskar et al. 2019, arXiv 1909.05858)
    stop: tuple[str, ...] = ()  # texts that end a response; they stay in it
    beams: int = 1  # with temperature 0 and more than 1: the likeliest whole response that so many beams find
    length_penalty: float = 1.0  # of beams: responses compare by log-probability / length^this


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits (B, V) float32 -> (B, V), divided by the temperature, -inf where a token may not be drawn."""
    assert logits.ndim == 2, logits.shape
    assert sampling.temperature > 0, sampling.temperature
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.min_p:
        least = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(sampling.min_p))
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # what likelier tokens hold already
        out = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def penalised(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """logits (B, V) where said (B, V) bool: divided by the penalty if above 0, else multiplied."""
    assert logits.shape == said.shape, (logits.shape, said.shape)
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """logits (B, V), uniform (B,) float64 in [0, 1) -> (B,) int64: the token at which the cumulated share passes it.

    A row's token depends on its own logits and number alone, whatever other rows there are.
    """
    assert uniform.shape == logits.shape[:1], (uniform.shape, logits.shape)
    rows, vocabulary = logits.shape
    shares = pad(logits.softmax(-1), (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    blocks = shares.sum(-1, dtype=torch.float64).cumsum(-1)  # no float64 over the whole vocabulary
    target = torch.minimum(uniform[:, None] * blocks[:, -1:], _below(blocks[:, -1:]))
    block = torch.searchsorted(blocks, target, right=True).clamp(max=blocks.shape[1] - 1)  # past the end where NaN
    before = pad(blocks, (1, 0)).gather(1, block)
    within = shares[torch.arange(rows, device=logits.device), block[:, 0]].double().cumsum(-1)
    rest = torch.minimum(target - before, _below(within[:, -1:]))
    return (block * BLOCK + torch.searchsorted(within, rest, right=True))[:, 0].clamp(max=vocabulary - 1)


def _below(total: Tensor) -> Tensor:
    """The next smaller number: what is rounded up to the whole must not pass its last token."""
    return total.nextafter(total.new_zeros(()))


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): a function of the key alone, such as (seed, step, prompt, sample)."""
    return np.random.default_rng(list(key)).random(count)
