"""Near-duplicates: rows whose sets of word n-grams are alike, by MinHash and locality-sensitive hashing.

For a random order of all n-grams, two sets have the same first one with the probability of their Jaccard similarity
J = |A ∩ B| / |A ∪ B| (Broder 1997). A signature holds the first of each set under P orders, so the share of places at
which two signatures agree estimates J, with a standard error of sqrt(J (1 - J) / P). Signatures are cut into b bands of
r numbers; rows that agree on a whole band, which happens with probability 1 - (1 - J^r)^b, are candidates, and each is
then compared over the whole signature (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.data.preparing.duplicates.groups import Groups
from align.data.preparing.duplicates.same import repeats
from align.data.preparing.grams import grams_at, mixed
from align.data.preparing.step import Decision, Item, Sketch, Sketches, Verdict, keep
from align.data.preparing.texts import normal, whole
from align.recipe.errors import UserError
from align.recipe.preparing.duplicates import Near

FOUND = 0.99  # of pairs that are just alike enough, the least share that become candidates
ROUNDS = 16  # in which the rows of a band are compared with one of them
PAIRS = 1 << 14  # compared at once
ROWS = 1 << 14  # whose band is hashed at once


class NearDuplicates:
    """Of rows that are alike, directly or through others, the first stays."""

    name, where, raw = "deduplicate.near", "workers", False

    def __init__(self, section: Near, seed: int, drop: bool) -> None:
        self.section, self.seed, self.drop = section, seed, drop
        self.minhash = rensa()

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """`signature`: (n, permutations) uint32; `compared`: (n,) bool, whether the row is long enough."""
        section = self.section
        words = [normal(whole(item.row)) for item in items]
        counts = np.array([max(len(said) - section.ngram + 1, 0) for said in words], np.int64)
        compared = np.array([len(said) >= max(section.min_words, section.ngram) for said in words], bool)
        grams = ngrams(self.minhash.hash_token_sets(words), section.ngram)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        matrix = self.minhash.digest_matrix_from_flat_token_hashes(grams, offsets, section.permutations, self.seed)
        signature = np.array(matrix.to_rows(), np.uint32).reshape(len(items), section.permutations)
        return {"signature": signature, "compared": compared}

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """See SetStep."""
        rows = np.flatnonzero(alive & sketches["compared"])
        groups = alike(sketches["signature"], rows, self.section.threshold)
        leader = groups.roots(rows)
        again = leader != rows
        reason = f"nearly the same as an earlier row (similarity {self.section.threshold:g} or more)"
        return repeats(len(sketches), rows[again], leader[again], reason, self.drop)

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """Rows stay as they are."""
        return keep(item)


def rensa() -> type:
    """The library's R-MinHash. Raises UserError where it is not installed."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError("deduplicate.near: rensa is not installed; pip install 'align[prepare]'") from None
    return RMinHash


def ngrams(hashes: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """Hashes of each row's words -> (m,) uint64, hashes of its word n-grams, row after row; none of a shorter row."""
    lengths = np.array([len(row) for row in hashes], np.int64)
    flat = np.fromiter((word for row in hashes for word in row), np.uint64, int(lengths.sum()))
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    inside = np.arange(len(flat)) - starts + n <= np.repeat(lengths, lengths)  # places where a whole n-gram begins
    return grams_at(flat, np.flatnonzero(inside), n)


def bands_of(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, numbers in each): as many numbers as leave a pair of the threshold's similarity FOUND likely to meet."""
    for r in range(permutations, 1, -1):
        b = permutations // r
        if 1 - (1 - threshold**r) ** b >= FOUND:
            return b, r
    return permutations, 1


def alike(signature: np.ndarray, rows: np.ndarray, threshold: float) -> Groups:
    """The groups of `rows`, (m,) ascending, whose signatures agree at the threshold's share of places or more.

    Besides the signatures, which may lie on disk, it holds some numbers a row.
    """
    bands, r = bands_of(threshold, signature.shape[1])
    groups = Groups(len(signature))
    for band in range(bands):
        keys = _band(signature, rows, band * r, r)
        order = np.argsort(keys, kind="stable")
        run = np.cumsum(_new(keys[order]))
        for _ in range(ROUNDS):  # each row of a run with its first; those unlike it are a run of their own
            begins = np.flatnonzero(_new(run))
            leader = np.repeat(order[begins], np.diff(np.append(begins, len(run))))
            later = order != leader
            a, b, order, run = rows[leader[later]], rows[order[later]], order[later], run[later]
            same = groups.roots(a) == groups.roots(b)
            unknown = np.flatnonzero(~same)
            same[unknown] = _agree(signature, a[unknown], b[unknown]) >= threshold
            groups.join(a[same], b[same])
            order, run = order[~same], run[~same]
            if not len(order):
                break
    return groups


def _new(ranked: np.ndarray) -> np.ndarray:
    """(m,) bool, whether each value is another than the one before."""
    return np.concatenate([np.ones(min(len(ranked), 1), bool), ranked[1:] != ranked[:-1]])


def _band(signature: np.ndarray, rows: np.ndarray, first: int, r: int) -> np.ndarray:
    """(m,) uint64, a hash of each row's numbers in one band."""
    keys = np.zeros(len(rows), np.uint64)
    for at in range(0, len(rows), ROWS):
        numbers = signature[rows[at : at + ROWS], first : first + r].astype(np.uint64)
        for i in range(r):
            keys[at : at + ROWS] = mixed(keys[at : at + ROWS], numbers[:, i])
    return keys


def _agree(signature: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(m,) float64, the share of places at which the signatures of `a[i]` and `b[i]` agree."""
    parts = [(signature[a[at : at + PAIRS]] == signature[b[at : at + PAIRS]]).mean(1) for at in range(0, len(a), PAIRS)]
    return np.concatenate(parts) if parts else np.zeros(0)
