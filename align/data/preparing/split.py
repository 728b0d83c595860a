"""Sides of a prepared set, with no prompt and no group of duplicates on two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np

from align.data.preparing.duplicates.groups import Groups, joined_by
from align.data.preparing.step import Decision, Item, Sketch, Sketches, Verdict, keep
from align.data.templates.render import prompt_key

TRAIN = "train"


class Split:
    """Whole groups go to each side, in the order of a seeded hash, until its share of the rows is reached."""

    name, where, raw = "split", "workers", False

    def __init__(self, shares: Mapping[str, float], seed: int) -> None:
        """`shares`: of the rows, by the name of the side; what is left is `train`."""
        self.shares, self.seed = dict(shares), seed

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """`prompt`: (n,) uint64."""
        return {"prompt": np.array([int.from_bytes(prompt_key(item.row), "little") for item in items], np.uint64)}

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """See SetStep. A group's place in the order depends on the seed and on its first prompt alone, so more data
        moves few rows across."""
        n, prompt = len(sketches), np.asarray(sketches["prompt"])
        groups, rows = Groups(n), np.flatnonzero(alive)
        groups.join(np.arange(n), group)
        groups.join(rows, joined_by(prompt[rows], rows)[0])
        roots, counts = np.unique(groups.roots(rows), return_counts=True)
        order = sorted(range(len(roots)), key=lambda i: _hash(self.seed, int(prompt[roots[i]])))
        side, chosen = np.zeros(n, np.int8), np.zeros(len(roots), np.int8)
        for number, share in enumerate(self.shares.values(), 1):
            wanted, held = round(share * len(rows)), 0
            for i in order:
                if held >= wanted:
                    break
                if not chosen[i] and held + counts[i] <= wanted:
                    chosen[i] = number
                    held += int(counts[i])
        side[rows] = chosen[np.searchsorted(roots, groups.roots(rows))]
        sides = (TRAIN, *self.shares)
        told = {name: int((side[rows] == number).sum()) for number, name in enumerate(sides)}
        return Decision(side=side, sides=sides, counts=told)

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """Rows stay as they are."""
        return keep(item)


def _hash(seed: int, prompt: int) -> bytes:
    return blake2b(seed.to_bytes(8, "little") + prompt.to_bytes(8, "little"), digest_size=8).digest()
