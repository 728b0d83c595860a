"""Beginnings that were computed before: keys and values of rows that have left, for rows that begin like them.

A conversation's next turn begins with all that was said; requests with one system prompt share it. What is kept is
found by its tokens alone, so nobody has to say that a request goes on from another.

Shapes: G key/value heads, l tokens of a beginning, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from torch import Tensor

from align.models.sampling.pools import Kept

LEAST = 16  # tokens that two rows must share


class Beginning(NamedTuple):
    """Tokens, and what the layers keep of them."""

    tokens: np.ndarray  # (l,) int32
    layers: dict[int, tuple[Tensor, Tensor]]  # (G, l, D) each


class Prefixes:
    """The beginnings that were used last, within a budget of tokens."""

    def __init__(self, budget: int) -> None:
        self.budget, self.held = budget, 0
        self.known: OrderedDict[int, tuple[int, Beginning]] = OrderedDict()  # model and beginning, oldest first
        self.buckets: dict[tuple[int, bytes], list[int]] = {}  # by model and first tokens
        self._next = 0

    def keep(self, model: int, tokens: np.ndarray, row: Kept) -> None:
        """The tokens of a row that leaves, as far as they are kept; what they go on from is not needed any more."""
        length = min(row.length, len(tokens))
        if length < LEAST or length > self.budget:
            return
        tokens = tokens[:length].copy()
        for number in list(self.buckets.get(_bucket(model, tokens), ())):
            shared = common(self.known[number][1].tokens, tokens)
            if shared == length:  # it is known already
                self.known.move_to_end(number)
                return
            if shared == len(self.known[number][1].tokens):
                self._drop(number)
        while self.known and self.held + length > self.budget:
            self._drop(next(iter(self.known)))
        layers = {layer: tuple(part.clone() for part in row.layer(layer, length)) for layer in row.pool.layers}
        self.known[self._next] = model, Beginning(tokens, layers)
        self.buckets.setdefault(_bucket(model, tokens), []).append(self._next)
        self.held += length
        self._next += 1

    def longest(self, model: int, tokens: np.ndarray) -> tuple[int, Beginning] | None:
        """The beginning that shares most with these tokens, and how many; at least LEAST, and never the last one."""
        best, found = LEAST - 1, None
        for number in self.buckets.get(_bucket(model, tokens), ()):
            shared = min(common(self.known[number][1].tokens, tokens), len(tokens) - 1)
            if shared > best:
                best, found = shared, number
        if found is None:
            return None
        self.known.move_to_end(found)
        return best, self.known[found][1]

    def forget(self, model: int) -> None:
        """All of a model."""
        for number in [number for number, (of, _) in self.known.items() if of == model]:
            self._drop(number)

    def shrink(self, tokens: int) -> bool:
        """Give memory of so many tokens back, of the oldest; whether there was any."""
        before = self.held
        while self.known and before - self.held < tokens:
            self._drop(next(iter(self.known)))
        return self.held < before

    def _drop(self, number: int) -> None:
        model, beginning = self.known.pop(number)
        bucket = _bucket(model, beginning.tokens)
        self.buckets[bucket].remove(number)
        if not self.buckets[bucket]:
            del self.buckets[bucket]
        self.held -= len(beginning.tokens)


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _bucket(model: int, tokens: np.ndarray) -> tuple[int, bytes]:
    return model, np.asarray(tokens[:LEAST], np.int32).tobytes()
