"""From rewards and values to advantages, and how far a policy has gone from its reference.

Shapes: P paths (responses), T steps of the longest, n labelled tokens. A response of k tokens has k + 1 steps: a value
before each token and one after the last, where the score arrives. So a value mask is one step longer than a policy
mask: `advantages[:, :-1][mask[:, 1:]]` are those of the k tokens. Steps stand at the left of their row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_path(flat: Tensor, path: Tensor, paths: int) -> tuple[Tensor, Tensor]:
    """flat (n,), path (n,) int64 in ascending order -> (P, T), filled with 0, and its mask (P, T) bool.

    `grid[mask]` is `flat` again.
    """
    assert flat.ndim == 1, flat.shape
    assert flat.shape == path.shape, (flat.shape, path.shape)
    assert (path[1:] >= path[:-1]).all(), "steps of one path stand together"
    counts = torch.bincount(path, minlength=paths)
    assert len(counts) == paths, (len(counts), paths)
    mask = torch.arange(int(counts.max()), device=path.device) < counts[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat), mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, all (P, T), mask bool -> advantages (P, T) and returns (P, T), 0 where masked.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16, backwards from the last step of each row:

        d_t = r_t + gamma V_{t+1} - V_t
        A_t = d_t + gamma lambda A_{t+1}
        R_t = A_t + V_t

    What lies behind the mask is worth nothing: V and A are 0 there, so a response that was cut off ends like any other.
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    assert rewards.ndim == 2, rewards.shape
    assert mask.dtype == torch.bool, mask.dtype
    assert (mask[:, :-1] | ~mask[:, 1:]).all(), "steps stand at the left"
    values = values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """values, mask of any one shape -> (3,) float64: count, sum and sum of squares where the mask is True.

    Add those of all processes and minibatches, then ask `mean_variance`.
    """
    assert values.shape == mask.shape, (values.shape, mask.shape)
    real = values[mask].double()
    return torch.stack(
        [torch.tensor(float(len(real)), dtype=real.dtype, device=real.device), real.sum(), (real**2).sum()]
    )


def mean_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of what `moments` (3,) counted; the variance of a single value is 0."""
    assert moments.shape == (3,), moments.shape
    count, total, squares = moments
    mean = total / count
    return mean, ((squares - count * mean**2) / (count - 1).clamp(min=1)).clamp(min=0)


def whiten(values: Tensor, mask: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """(v - mean) / sqrt(variance + 1e-8) where the mask is True, else 0; values, mask of any one shape.

    Mean and variance are the caller's, taken over all processes, so that every process whitens alike.
    """
    assert values.shape == mask.shape, (values.shape, mask.shape)
    white = (values - mean) / (torch.as_tensor(variance) + 1e-8).sqrt()
    return white.to(values.dtype).masked_fill(~mask, 0)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log ref of sampled tokens, (n,) -> (n,): its mean over samples is KL(p, ref); one alone may be negative.

    The three estimators: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log ref)^2 / 2, (n,) -> (n,): never negative, slightly biased."""
    return k1(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref / p - 1 - log(ref / p), (n,) -> (n,): never negative, unbiased, heavy-tailed where p is far below ref."""
    log_ratio = -k1(logprobs, ref_logprobs)
    return log_ratio.expm1() - log_ratio


def adapted(kl_coef: float, kl: float, target: float, horizon: float, steps: int) -> float:
    """The next KL coefficient, kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) steps / horizon).

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. `kl` is the mean per response since the last call, during
    which `steps` responses were sampled. More than `horizon` of them count a horizon at a time, for at once they could
    turn the coefficient negative, which would pay for KL.
    """
    assert target > 0, target
    assert horizon > 0, horizon
    error = min(max(kl / target - 1, -0.2), 0.2)
    whole, rest = divmod(steps, horizon)
    return kl_coef * (1 + error) ** whole * (1 + error * rest / horizon)
