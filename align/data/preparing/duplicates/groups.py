"""Rows that belong together, as the components of a graph whose edges come in large arrays."""

from __future__ import annotations

import numpy as np


class Groups:
    """n rows, each at first in a group of its own; a group's number is that of its first row."""

    def __init__(self, n: int) -> None:
        self.parent = np.arange(n, dtype=np.int64)  # each row's parent is no later than itself

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the groups of `a[i]` and `b[i]`, (m,) int64 each, for every i: the later root is hung under the earlier
        one, for all edges at once, until no edge is left between two groups."""
        while True:
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self, rows: np.ndarray) -> np.ndarray:
        """(m,) int64, the groups of these rows."""
        found = self.parent[rows]
        while not np.array_equal(found, above := self.parent[found]):
            found = above
        self.parent[rows] = found
        return found

    def all(self) -> np.ndarray:
        """(n,) int64, the group of every row."""
        return self.roots(np.arange(len(self.parent)))


def joined_by(key: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `rows`, (m,) ascending, and their keys: (m,) the first row with each one's key, and (m,) bool, whether that is
    an earlier one."""
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    leader = rows[first[inverse.reshape(-1)]]
    return leader, leader != rows
