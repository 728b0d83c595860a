"""Keys and values of rows that come and go: pools of rows, each of rows with room for so many tokens.

A row lies in the smallest pool that it fits, and moves to the next when it outgrows it. So attention reads at most
twice what a row has, however long its neighbours are, and rows that have left leave no holes.

Shapes: n rows of a pool, B rows in all, G key/value heads, H query heads, T tokens that a pool has room for, D head
size, m tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "align_running"
SMALLEST = 64  # tokens of a row of the smallest pool


class Kept:
    """One row's place, and how many tokens of it are kept."""

    def __init__(self, pool: Pool, slot: int) -> None:
        self.pool, self.slot, self.length = pool, slot, 0

    def layer(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `tokens` tokens, (G, tokens, D) each: views."""
        keys, values = self.pool.layers[layer]
        return keys[self.slot, :, :tokens], values[self.slot, :, :tokens]


class Pool:
    """Rows of at most `room` tokens, side by side without holes: the last one takes the place of one that leaves."""

    def __init__(self, room: int) -> None:
        self.room, self.capacity = room, 0
        self.rows: list[Kept] = []
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # (capacity, G, T, D) each

    def add(self) -> Kept:
        """A row more; the capacity allows it."""
        assert len(self.rows) < self.capacity
        self.rows.append(Kept(self, len(self.rows)))
        return self.rows[-1]

    def remove(self, kept: Kept) -> None:
        """One that leaves. Nothing of it stays: a share of 0 of what is no number would be none, for whose place it is
        next."""
        last = self.rows.pop()
        for parts in self.layers.values():
            for part in parts:
                if last is not kept:
                    part[kept.slot, :, : last.length] = part[last.slot, :, : last.length]
                    part[kept.slot, :, last.length : kept.length] = 0
                part[last.slot, :, : last.length] = 0
        if last is not kept:
            self.rows[kept.slot], last.slot = last, kept.slot
        if not self.rows:
            self.resize(0)

    def resize(self, capacity: int) -> None:
        """Room for so many rows; one layer after the other, so that never half a cache more is held."""
        assert capacity >= len(self.rows)
        for layer, parts in list(self.layers.items()):
            self.layers[layer] = tuple(self._resized(part, capacity) for part in parts)
        if not capacity:
            self.layers.clear()
        self.capacity = capacity

    def _resized(self, part: Tensor, capacity: int) -> Tensor:
        kept = part.new_zeros(capacity, *part.shape[1:])  # see `remove`
        kept[: len(self.rows)] = part[: len(self.rows)]
        return kept

    def hold(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The layer's keys and values; made where it has none, for tensors (…, G, tokens, D) like these."""
        if layer not in self.layers:
            self.layers[layer] = tuple(
                part.new_zeros(self.capacity, part.shape[-3], self.room, part.shape[-1]) for part in like
            )
        return self.layers[layer]


class Pools:
    """All rows, within a budget of tokens."""

    def __init__(self, budget: int, longest: int) -> None:
        """`budget`: tokens that there is memory for; `longest`: that a row can have."""
        self.budget, self.longest = budget, min(longest, budget)
        sizes = [min(SMALLEST, self.longest)]
        while sizes[-1] < self.longest:
            sizes.append(min(2 * sizes[-1], self.longest))
        self.pools = [Pool(size) for size in sizes]

    @property
    def held(self) -> int:
        """Tokens that memory is held for."""
        return sum(pool.capacity * pool.room for pool in self.pools)

    def place(self, tokens: int) -> Kept | None:
        """A row with room for so many tokens; None where the budget has none."""
        pool = next(pool for pool in self.pools if pool.room >= tokens)
        if len(pool.rows) == pool.capacity and not self._grow(pool):
            return None
        return pool.add()

    def wider(self, kept: Kept, tokens: int) -> Kept | None:
        """The row with room for so many tokens: itself, or its like in another pool. None where the budget has none,
        and then it stays as it was."""
        if tokens <= kept.pool.room:
            return kept
        moved = self.place(tokens)
        if moved is not None:
            for layer, parts in kept.pool.layers.items():
                for new, old in zip(moved.pool.hold(layer, parts), parts, strict=True):
                    new[moved.slot, :, : kept.length] = old[kept.slot, :, : kept.length]
            moved.length = kept.length
            kept.pool.remove(kept)
        return moved

    def clear(self) -> None:
        """No row is left."""
        for pool in self.pools:
            pool.rows.clear()
            pool.resize(0)

    def _grow(self, pool: Pool) -> bool:
        """Room for more rows: half as many again, or as many as there is memory for."""
        wanted = max(4, len(pool.rows) // 2)
        if self.held + wanted * pool.room > self.budget:
            for other in self.pools:  # rows that stand empty
                if other.capacity > len(other.rows):
                    other.resize(len(other.rows))
            wanted = min(wanted, (self.budget - self.held) // pool.room)
        if wanted < 1:
            return False
        pool.resize(pool.capacity + wanted)
        return True


class Filling:
    """Takes the place of transformers' cache in a pass over parts of rows, packed side by side into one."""

    def __init__(self, parts: Sequence[tuple[Kept, int]]) -> None:
        """Rows, and how many tokens of each come now, after those that are kept."""
        self.parts, self.masks = parts, dict[tuple[int, int, int | None], Tensor]()

    def update(self, key: Tensor, value: Tensor, layer: int, *_more: object) -> tuple[Tensor, Tensor]:
        """(1, G, m, D) each, of all parts side by side."""
        first, self.layer = 0, layer
        for row, count in self.parts:
            for kept, states in zip(row.pool.hold(layer, (key, value)), (key, value), strict=True):
                kept[row.slot, :, row.length : row.length + count] = states[0, :, first : first + count]
            first += count
        return key, value

    def attend(self, query: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """(1, H, m, D) -> (1, m, H, D)."""
        out, first = query.new_empty(query.shape[2], query.shape[1], query.shape[3]), 0
        for row, count in self.parts:
            total = row.length + count
            key, value = (
                part.repeat_interleave(query.shape[1] // len(part), 0) for part in row.layer(self.layer, total)
            )
            asked, seen = query[0, :, first : first + count], self._seen(count, total, window)
            if softcap is None:
                plain = count == total and (window is None or total <= window)
                found = scaled_dot_product_attention(
                    asked[None], key[None], value[None], None if plain else seen, is_causal=plain, scale=scale
                )[0]
            else:
                scores = softcap * torch.tanh(asked @ key.transpose(1, 2) * (scale / softcap))
                found = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
            out[first : first + count] = found.transpose(0, 1)
            first += count
        return out[None]

    def _seen(self, count: int, total: int, window: int | None) -> Tensor:
        """(count, total) bool: what each of the newest tokens sees."""
        if (count, total, window) not in self.masks:
            device = self.parts[0][0].layer(self.layer, 1)[0].device
            place = torch.arange(total, device=device)
            here = place[-count:, None]
            seen = place <= here
            self.masks[count, total, window] = seen if window is None else seen & (place > here - window)
        return self.masks[count, total, window]

    def get_seq_length(self, *_layer: int) -> int:
        """Nothing came before: rows know their own positions."""
        return 0


class Part(NamedTuple):
    """Rows of a step that lie in one pool, in the order of their slots."""

    pool: Pool
    places: Tensor  # (b,) int64 in the batch
    slots: Tensor  # (b,) int64 in the pool
    lengths: Tensor  # (n,) int64 of all rows of the pool, the newest tokens not counted


class Stepping:
    """The same for one more token of each row."""

    def __init__(self, rows: Sequence[Kept], device: torch.device) -> None:
        """In the order of the batch."""
        self.parts: list[Part] = []
        self.masks = dict[tuple[int, int | None], Tensor]()
        for pool in dict.fromkeys(row.pool for row in rows):
            chosen = sorted((row.slot, place) for place, row in enumerate(rows) if row.pool is pool)
            lengths = [row.length for row in pool.rows]
            numbers = ([place for _, place in chosen], [slot for slot, _ in chosen], lengths)
            self.parts.append(Part(pool, *(torch.tensor(part, device=device) for part in numbers)))

    def update(self, key: Tensor, value: Tensor, layer: int, *_more: object) -> tuple[Tensor, Tensor]:
        """(B, G, 1, D) of the newest tokens."""
        self.layer = layer
        for pool, places, slots, lengths in self.parts:
            for kept, newest in zip(pool.hold(layer, (key, value)), (key, value), strict=True):
                kept[slots, :, lengths[slots]] = newest[places, :, 0]
        return key, value

    def attend(self, query: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """(B, H, 1, D) -> (B, 1, H, D), each row over its own length."""
        out = query.new_empty(len(query), query.shape[1], query.shape[3])
        for number, (pool, places, slots, _) in enumerate(self.parts):
            # The whole room: a product with a part of it would copy that part first.
            keys, values = (part[: len(pool.rows)] for part in pool.layers[self.layer])
            asked = query[places, :, 0]
            if len(slots) < len(pool.rows):  # a row that is still being filled is asked nothing
                asked = asked.new_zeros(len(pool.rows), *asked.shape[1:]).index_copy_(0, slots, asked)
            rows, heads, size = asked.shape
            scores = asked.view(rows, keys.shape[1], -1, size) @ keys.transpose(2, 3)  # (n, G, H / G, T)
            scores = scores.float() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            shares = scores.masked_fill_(self._unseen(number, window), -torch.inf).softmax(-1)
            found = (shares.to(values.dtype) @ values).view(rows, heads, size)
            out[places] = found if len(slots) == rows else found[slots]
        return out[:, None]

    def _unseen(self, number: int, window: int | None) -> Tensor:
        """(n, 1, 1, T) bool, True where a row has no token, or one that lies more than a window back."""
        if (number, window) not in self.masks:
            pool, _, _, lengths = self.parts[number]
            place = torch.arange(pool.room, device=lengths.device)[None]
            unseen = place > lengths[:, None]
            if window is not None:
                unseen |= place <= lengths[:, None] - window
            self.masks[number, window] = unseen[:, None, None]
        return self.masks[number, window]

    def get_seq_length(self, *_layer: int) -> int:
        """Rows know their own positions."""
        return 0


def running_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kept: Filling | Stepping | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """In transformers' attention interface: keys and values are those that are kept."""
    assert kept is not None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kept.attend(query, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, running_attention)
