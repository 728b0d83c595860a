"""Advantages without a critic: what a response is worth beside the others.

Shapes: N prompts with k responses each, a group a row; E = N k responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-4  # added to a spread before it divides, as in TRL
ALIKE = 1e-6  # scores of a group that lie no farther apart are equal but for rounding


def centred(scores: Tensor) -> Tensor:
    """r - mean of its group, (N, k) -> (N, k). Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), eq. 3."""
    assert scores.ndim == 2, scores.shape
    return scores - scores.mean(1, keepdim=True)


def standardised(scores: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) of its group, (N, k) -> (N, k); 0 where all are equal.

    GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300), section 4.1.2; the spread is the unbiased one.
    """
    assert scores.ndim == 2, scores.shape
    assert scores.shape[1] > 1, "one response has no spread"
    return torch.where(equal(scores)[:, None], 0.0, centred(scores) / (scores.std(1, keepdim=True) + SMALL))


def leave_one_out(scores: Tensor) -> Tensor:
    """r - mean of the others of its group, (N, k) -> (N, k): k / (k - 1) times the centred one.

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740), eq. 6.
    """
    assert scores.ndim == 2, scores.shape
    assert scores.shape[1] > 1, "one response has no others"
    others = (scores.sum(1, keepdim=True) - scores) / (scores.shape[1] - 1)
    return scores - others


def of_batch(scores: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) over all responses of the step, (N, k) -> (N, k).

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), eq. 5; a single response has the advantage 0.
    """
    assert scores.ndim == 2, scores.shape
    spread = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / (spread + SMALL)


def equal(scores: Tensor) -> Tensor:
    """(N, k) -> (N,) bool: whether all scores of a group are equal, so that it says nothing of better and worse."""
    assert scores.ndim == 2, scores.shape
    apart = scores.amax(1) - scores.amin(1)
    return apart <= ALIKE * scores.abs().amax(1).clamp(min=1)


def overlong(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """How far each response reaches into the last `buffer` tokens of `longest`, (E,) int64 -> (E,) in [0, 1].

    The soft punishment of DAPO (Yu et al. 2025, arXiv 2503.14476), eq. 13, with the sign of a penalty: 0 up to
    longest - buffer, then linear, 1 at `longest`.
    """
    assert lengths.ndim == 1, lengths.shape
    assert 0 < buffer <= longest, (buffer, longest)
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)
