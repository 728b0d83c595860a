"""Advantages without a critic: what a response is worth beside the others.

Shapes: N prompts with k responses each, a group a row; E = N k responses. A response without a score has nan, is no
part of its group, and has the advantage nan.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-4  # added to a spread before it divides, as in TRL
ALIKE = 1e-6  # scores of a group that lie no farther apart are equal but for rounding


def centred(scores: Tensor) -> Tensor:
    """r - mean of its group, (N, k) -> (N, k). Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), eq. 3."""
    assert scores.ndim == 2, scores.shape
    return scores - scores.nanmean(1, keepdim=True)


def standardised(scores: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) of its group, (N, k) -> (N, k); 0 where all are equal.

    GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300), section 4.1.2; the spread is the unbiased one.
    """
    assert scores.ndim == 2, scores.shape
    assert scores.shape[1] > 1, "one response has no spread"
    apart, others = centred(scores), (_known(scores) - 1).clamp(min=1)
    spread = (apart.square().nansum(1, keepdim=True) / others).sqrt()
    return (apart / (spread + SMALL)).masked_fill(equal(scores)[:, None] & ~scores.isnan(), 0.0)


def leave_one_out(scores: Tensor) -> Tensor:
    """r - mean of the others of its group, (N, k) -> (N, k): k / (k - 1) times the centred one; 0 without others.

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740), eq. 6.
    """
    assert scores.ndim == 2, scores.shape
    assert scores.shape[1] > 1, "one response has no others"
    known = _known(scores)
    return centred(scores) * known / (known - 1).clamp(min=1)


def of_batch(scores: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) over all responses of the step, (N, k) -> (N, k).

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), eq. 5; a single response has the advantage 0.
    """
    assert scores.ndim == 2, scores.shape
    known = scores[~scores.isnan()]
    spread = known.std() if len(known) > 1 else scores.new_zeros(())
    return (scores - known.mean()) / (spread + SMALL)


def _known(scores: Tensor) -> Tensor:
    """How many of each group are known, (N, k) -> (N, 1)."""
    return (~scores.isnan()).sum(1, keepdim=True)


def equal(scores: Tensor) -> Tensor:
    """(N, k) -> (N,) bool: whether all known scores of a group are equal, so that it says nothing of what is better."""
    assert scores.ndim == 2, scores.shape
    unknown = scores.isnan()
    apart = scores.masked_fill(unknown, -torch.inf).amax(1) - scores.masked_fill(unknown, torch.inf).amin(1)
    return apart <= ALIKE * scores.masked_fill(unknown, 0.0).abs().amax(1).clamp(min=1)


def overlong(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """How far each response reaches into the last `buffer` tokens of `longest`, (E,) int64 -> (E,) in [0, 1].

    The soft punishment of DAPO (Yu et al. 2025, arXiv 2503.14476), eq. 13, with the sign of a penalty: 0 up to
    longest - buffer, then linear, 1 at `longest`.
    """
    assert lengths.ndim == 1, lengths.shape
    assert 0 < buffer <= longest, (buffer, longest)
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)
