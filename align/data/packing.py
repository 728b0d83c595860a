"""Which examples share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush


def pack(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Put items into as few rows of at most `budget` tokens as best fit finds, then even the rows out.

    Returns the indices of each row's items; the number of rows is a multiple of `multiple` (processes that step
    together), so rows may be empty. An item longer than the budget has a row of its own.
    """
    order = _longest_first(lengths)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in order:
        place = bisect_left(room, (lengths[i], -1))
        if place < len(room):
            left, r = room.pop(place)
        else:
            left, r = budget, len(rows)
            rows.append([])
        rows[r].append(i)
        insort(room, (left - lengths[i], r))
    count = _rounded(len(rows), multiple)
    # Even rows wait less for each other: longest first into the emptiest, kept if the budget still holds.
    even: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, r) for r in range(count)]
    for i in order:
        total, r = heappop(filled)
        even[r].append(i)
        heappush(filled, (total + lengths[i], r))
    if all(total <= budget or len(even[r]) == 1 for total, r in filled):
        rows = even
    return _filled([sorted(row) for row in rows], count)


def pack_padded(
    lengths: Sequence[int], budget: int, multiple: int = 1, paths: Sequence[int] | None = None
) -> list[list[int]]:
    """The same for padded rows, which cost their number times the longest: items of like length together.

    `paths`: how many rows each item takes, all as long as its longest (default: one).
    """
    rows: list[list[int]] = []
    taken = 0
    for i in _longest_first(lengths):
        more = paths[i] if paths is not None else 1
        if rows and (taken + more) * lengths[rows[-1][0]] <= budget:
            rows[-1].append(i)
            taken += more
        else:
            rows.append([i])
            taken = more
    return _filled(rows, _rounded(len(rows), multiple))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _rounded(count: int, multiple: int) -> int:
    return max(-(-count // multiple), 1) * multiple


def _filled(rows: list[list[int]], count: int) -> list[list[int]]:
    return rows + [[] for _ in range(count - len(rows))]
