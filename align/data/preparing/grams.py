"""Hashes of word n-grams out of hashes of words."""

from __future__ import annotations

import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: it spreads low bits upwards


def grams_at(words: np.ndarray, begin: np.ndarray, n: int) -> np.ndarray:
    """(w,) uint64 hashes of words -> (m,) uint64, a hash of the n words from each place in `begin`, (m,) int64."""
    found = np.zeros(len(begin), np.uint64)
    for i in range(n):
        found = mixed(found, words[begin + i])
    return found


def mixed(found: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Hashes of what was hashed and, after it, `more`; all (m,) uint64."""
    found = (found ^ more) * MULTIPLIER
    return found ^ (found >> np.uint64(29))
