"""How much of each source a mixture holds: pure arithmetic over their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tempered(weights: Sequence[float], temperature: float) -> np.ndarray:
    """Shares p_i = w_i^(1/T) / Σ_j w_j^(1/T), (n,) float64: as weighted at T = 1, all alike as T grows.

    With sizes for weights, that is how multilingual models sample their languages (Conneau et al. 2020,
    arXiv 1911.02116, with alpha = 1/T; Xue et al. 2021, arXiv 2010.11934). Raises ValueError for weights below 0 or all
    0.
    """
    known = np.asarray(weights, np.float64)
    if not (np.isfinite(known).all() and (known >= 0).all() and known.any()):
        raise ValueError(f"weights must be finite and 0 or more, not all 0: {list(weights)}")
    powers = np.where(known > 0, (known / known.max()) ** (1 / temperature), 0.0)
    return powers / powers.sum()


def amounts(shares: np.ndarray, limits: np.ndarray, total: float | None = None) -> np.ndarray:
    """How much to take of each source, (n,) float64, where source i has no more than `limits[i]` to give.

    `shares` sum to 1. Without a `total`: as much as there can be at exactly these shares. With one: a source that has
    not enough gives all it has, and the others make up for it at their shares of the rest; all together give no more
    than there is.
    """
    wanted = shares > 0
    if total is None:
        return shares * (limits[wanted] / shares[wanted]).min()
    taken, left = np.zeros(len(shares)), wanted.copy()
    while left.any():
        rest = total - taken.sum()
        offered = shares * rest / shares[left].sum()
        short = left & (offered > limits)
        if not short.any():
            taken[left] = offered[left]
            break
        taken[short], left = limits[short], left & ~short
    return taken


def times(sizes: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    """How often each row comes, (n,) int64, so that they are `amount` together: all rows as often as that goes, and
    once more a random choice whose size is nearest to what is then lacking.

    `sizes`: (n,) of the rows, in the unit of `amount`; 1 each, or their tokens.
    """
    whole = int(sizes.sum())
    if not whole:
        return np.zeros(len(sizes), np.int64)
    passes = int(amount // whole)
    counts, lacking = np.full(len(sizes), passes, np.int64), amount - passes * whole
    order = random.permutation(len(sizes))
    reached = np.concatenate([[0], np.cumsum(sizes[order])])
    counts[order[: int(np.abs(reached - lacking).argmin())]] += 1
    return counts


def passes_of(weights: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """Passes over each source in an epoch, (n,) float64, at which its share of all that is seen is its share of the
    weights, and an epoch is as large as all sources together. Sources of size 0 have none, and no weight.
    """
    held = np.asarray(sizes, np.float64)
    known = np.where(held > 0, np.asarray(weights, np.float64), 0.0)
    wanted = known / known.sum() * held.sum() if known.any() else known
    return np.divide(wanted, held, out=np.zeros(len(held)), where=held > 0)
