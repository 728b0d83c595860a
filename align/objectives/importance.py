"""Weights for tokens that another engine drew than the one that learns from them.

Shapes: E episodes (responses), T tokens of the longest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def truncated_importance(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """min(p / p_engine, cap) of each token, 1 with `cap` None, (E, T) each, mask bool -> (E, T), 0 where masked.

    A token was drawn with the probability p_engine, but is learnt from as if with p, which differs in rounding,
    kernels or precision. The weight corrects the mean over tokens; the cap bounds its variance (Espeholt et al. 2018,
    "IMPALA", arXiv 1802.01561; for language models Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", fengyao.notion.site/off-policy-rl).
    """
    assert logprobs.shape == engine_logprobs.shape == mask.shape, (logprobs.shape, engine_logprobs.shape, mask.shape)
    assert mask.dtype == torch.bool, mask.dtype
    if cap is None:
        return mask.to(logprobs.dtype)
    assert cap > 0, cap
    log_ratio = (logprobs - engine_logprobs).clamp(max=math.log(cap) + 1)  # far apart, exp would be infinite
    return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 0)
