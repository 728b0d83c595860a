"""Rows that are longer than the limit: an error, dropped, cut off, or cut into chunks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from align.data.examples import Ledger, Part, unusable
from align.recipe.errors import UserError
from align.recipe.schema import Data

NAMED = 10  # rows that an error names one by one


def fitted(data: Data, sides: list[list[Part]], ledger: Ledger) -> tuple[list[list[Part]], list[str]]:
    """The parts without the overlong rows that `data.overlong` does not keep; and the problems.

    `truncate` keeps those that have a label left when cut, `chunk` keeps texts, which `chunked` then cuts.
    """
    limit, fitted, long = data.max_length, [], []
    for parts in sides:
        fitted.append([])
        for part in parts:
            lengths = part.store.longest[part.rows]
            over = lengths > limit
            long += [(int(n), *part.store.place(row)) for n, row in zip(lengths[over], part.rows[over], strict=True)]
            if data.overlong == "truncate":
                fitted[-1].append(part.less(_truncated(part, lengths, limit, ledger)))
            elif data.overlong == "chunk":
                talks = over & (part.store.plain[part.rows] == 0)
                reason = f"more than {limit} tokens, and only texts are cut into chunks"
                fitted[-1].append(ledger.drop(part, talks, "overlong", reason))
            else:
                fitted[-1].append(ledger.drop(part, over, "overlong", f"more than {limit} tokens"))
    if not long or data.overlong != "error":
        return fitted, []
    first = ", ".join(f"{file}:{line} ({n:,})" for n, file, line in long[:NAMED])
    return fitted, [
        f"{counted(len(long))} longer than data.max_length = {limit:,} tokens, the longest {max(long)[0]:,}: "
        f"{first}{', …' * (len(long) > NAMED)}; raise data.max_length, or set data.overlong=drop or =truncate"
    ]


def chunked(part: Part, limit: int, ledger: Ledger) -> Part:
    """The part with each overlong text as several examples of like length, at most `limit` tokens.

    A chunk begins with the last token of the one before, as context: so each token of a text but its first is predicted
    once, and by a token of the same text. Raises UserError for a limit that leaves room for the context alone.
    """
    over = part.store.longest[part.rows] > limit
    if over.any() and limit < 2:
        raise UserError(f"data.max_length: {limit} leaves no token to learn beside a chunk's first; give it 2 or more")
    rows, chunks = [], []
    for row, long in zip(part.rows, over, strict=True):
        edges = [(0, 0)]
        if long:
            n = int(part.store.longest[row])
            cuts = np.linspace(0, n - 1, -(-(n - 1) // (limit - 1)) + 1).astype(np.int64)
            edges = [(int(first), int(last) + 1) for first, last in pairwise(cuts)]
            ledger.add(*part.store.place(row), "chunked", f"{n} tokens cut into {len(edges)} chunks")
        rows += [row] * len(edges)
        chunks += edges
    return part._replace(rows=np.array(rows, np.int64), chunks=np.array(chunks, np.int64).reshape(-1, 2))


def counted(count: int) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} row{'s' * (count != 1)}"


def _truncated(part: Part, lengths: np.ndarray, limit: int, ledger: Ledger) -> np.ndarray:
    """(k,) bool, rows of which nothing can be learnt when they are cut; each that is cut has an entry."""
    lost = np.zeros(len(lengths), bool)
    for i in np.flatnonzero(lengths > limit):
        row = part.rows[i]
        reason = unusable(part.store.tree(row), limit)
        lost[i] = reason is not None
        if reason:
            ledger.lose(*part.store.place(row), "overlong", reason)
        else:
            ledger.add(*part.store.place(row), "truncated", f"{lengths[i]} tokens cut to {limit}")
    return lost
