"""The running batch: rows of all adapters, which come and go between two tokens.

A step computes what is waiting, packed, up to a number of tokens, and then one more token of every row that goes on
(continuous batching: Yu et al. 2022, "Orca", OSDI). A row's tokens are a function of its prompt, its model and its key,
as those of `sample` are: not of the rows beside it, nor of when it came.

Where memory is short, the row that came last gives its place back and waits again; its tokens stay, and their keys and
values are computed anew.

Shapes: b rows of a pass, m its tokens, V vocabulary, d hidden size, K scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from align.models import acceleration
from align.models.sampling.adapters import BARE, Adapters
from align.models.sampling.decode import FEW_ROWS, projection
from align.models.sampling.mixed import chosen
from align.models.sampling.pools import NAME, Filling, Kept, Pools, Stepping
from align.models.sampling.prefixes import Prefixes, common
from align.models.sampling.requests import End, Request, Said
from align.models.trunk import Trunk

MOST_ROWS = {"cpu": 256, "cuda": 1024}
FILLED = {"cpu": 512, "cuda": 4096}  # tokens of prompts in one step: rows that go on wait so long
PREFIX_SHARE = 1 / 4  # of the kept tokens: of rows that have left
Event = tuple[Request, Said]


class Running:
    """All rows on one trunk. Everything here is called from one thread."""

    def __init__(
        self, trunk: Trunk, most_rows: int | None = None, budget: int | None = None, acts: str | None = None
    ) -> None:
        """`budget`: tokens whose keys and values are kept; default: the trunk's own. `acts`: the trunk's own adapter
        that every row is under; None: none is."""
        assert trunk.packed, "rows of layers that keep another state cannot be packed"
        self.trunk, device = trunk, trunk.device
        trunk.eval().requires_grad_(False).attend(NAME)
        self.settled = ExitStack()  # for good
        if trunk.adapted:
            self.settled.enter_context(trunk.acting(acts))
        self.settled.enter_context(acceleration.for_sampling(trunk, FEW_ROWS))
        self.project, self.adapters = projection(trunk), Adapters(trunk)
        budget = trunk.budgets.cache_tokens if budget is None else budget
        positions = getattr(trunk.plain.config.get_text_config(), "max_position_embeddings", None)
        shared = int(budget * PREFIX_SHARE)
        self.prefixes, self.pools = Prefixes(shared), Pools(budget - shared, positions or budget)
        self.most = most_rows or MOST_ROWS.get(device.type, MOST_ROWS["cuda"])
        self.filled = min(FILLED.get(device.type, FILLED["cuda"]), max(trunk.budgets.prompt_tokens, 1))
        self.waiting: deque[Request] = deque()
        self.filling: list[Request] = []
        self.going: list[Request] = []
        self.retired: set[int] = set()

    @property
    def room(self) -> int:
        """Tokens that a row may have, prompt and answer together."""
        return self.pools.longest

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.filling or self.going)

    def join(self, row: Request) -> None:
        """From the next step on."""
        assert len(row.prompt)
        assert len(row.prompt) + len(row.drawn) <= self.room
        self.waiting.append(row)

    def has(self, number: int) -> bool:
        """Whether a new row may have this adapter."""
        return number == BARE or (number in self.adapters.known and number not in self.retired)

    def retire(self, number: int) -> None:
        """An adapter that no new row will have: it goes with its last row."""
        self.retired.add(number)
        self._remove_retired()

    def _remove_retired(self) -> None:
        used = {row.voice.adapter for row in (*self.waiting, *self.filling, *self.going)}
        for number in self.retired - used:
            self.prefixes.forget(number)
            self.adapters.remove(number)
        self.retired &= used

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One token more of every row that goes on, and what can be begun of those that wait."""
        self._drop()
        self._admit()
        events = [*self._fill(), *self._go_on()]
        for row, said in events:
            if said.end:
                self._end(row)
        if self.retired:
            self._remove_retired()
        return events

    def close(self) -> None:
        """Nothing is computed any more."""
        self.settled.close()

    def clear(self) -> list[Request]:
        """All rows leave at once, after a fault; which they were."""
        rows = [*self.waiting, *self.filling, *self.going]
        self.waiting.clear()
        self.filling, self.going = [], []
        self.pools.clear()
        self.prefixes.shrink(self.prefixes.held)
        return rows

    def _drop(self) -> None:
        """Rows that nobody waits for."""
        for row in [row for row in (*self.filling, *self.going) if row.cancelled]:
            self._end(row)
        if any(row.cancelled for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.cancelled)

    def _end(self, row: Request) -> None:
        row.over = True
        for rows in (self.filling, self.going):
            if row in rows:
                rows.remove(row)
        if row.kept:
            self.prefixes.keep(row.voice.adapter, row.tokens, row.kept)
            row.kept.pool.remove(row.kept)
            row.kept = None

    def _admit(self) -> None:
        """Rows that wait, in their order, while there is room; one whose prompt another computes waits for it."""
        passed: list[Request] = []
        pending = sum(row.pending for row in self.filling)
        while self.waiting and len(self.filling) + len(self.going) < self.most and pending < self.filled:
            row = self.waiting.popleft()
            first = row.after
            if first is not None and not (first.over or first.cancelled) and not first.said:
                passed.append(row)
                continue
            row.kept = self._place(row.length + 1)
            if row.kept is None:
                self.waiting.appendleft(row)
                break
            row.reused = max(row.reused, self._reuse(row))
            pending += row.pending
            self.filling.append(row)
        self.waiting.extendleft(reversed(passed))

    def _place(self, tokens: int) -> Kept | None:
        return self.pools.place(min(tokens, self.pools.longest))

    def _reuse(self, row: Request) -> int:
        """Take over what is known of a row's tokens; how many they are."""
        tokens, first = row.tokens, row.after
        if first is not None and first.kept is not None:
            shared = min(common(first.tokens[: first.kept.length], tokens), len(tokens) - 1)
            layers = {layer: first.kept.layer(layer, shared) for layer in first.kept.pool.layers}
        elif found := self.prefixes.longest(row.voice.adapter, tokens):
            shared, layers = found[0], found[1].layers
        else:
            return 0
        for layer, parts in layers.items():
            for kept, known in zip(row.kept.pool.hold(layer, parts), parts, strict=True):
                kept[row.kept.slot, :, :shared] = known[:, :shared]
        row.kept.length = shared
        return shared

    def _fill(self) -> Iterator[Event]:
        """The beginnings of rows, packed, as many tokens as one step takes."""
        left, parts = self.filled, list[tuple[Request, int]]()
        for row in self.filling:
            if left and (row.pending > 1 or row.head is not None):
                parts.append((row, min(row.pending, left)))
                left -= parts[-1][1]
        parts.sort(key=lambda part: part[0].voice.adapter)
        if parts:
            hidden = self._pass(parts)
            for row, count in parts:
                row.kept.length += count
            ends = np.cumsum([count for _, count in parts]) - 1
            done = [i for i, (row, _) in enumerate(parts) if not row.pending]
            rows, states = [parts[i][0] for i in done], hidden[torch.from_numpy(ends[done]).to(hidden.device)]
            self.filling = [row for row in self.filling if row not in rows]
            yield from self._spoken(rows, states)
            self.going += [row for row in rows if row.head is None and not row.over]
        ready = [row for row in self.filling if row.pending == 1 and row.head is None]
        self.filling = [row for row in self.filling if row not in ready]
        self.going += ready

    def _pass(self, parts: Sequence[tuple[Request, int]]) -> Tensor:
        """Final hidden states (m, d) of the next tokens of rows."""
        trunk, filling = self.trunk, Filling([(row.kept, count) for row, count in parts])
        tokens = [row.tokens[row.kept.length :][:count] for row, count in parts]
        places = [np.arange(row.kept.length, row.kept.length + count) for row, count in parts]
        numbers, counts = zip(*((row.voice.adapter, count) for row, count in parts), strict=True)
        with self.adapters.acting(numbers, counts), trunk.autocast():
            return trunk.decoder(
                input_ids=_tensor(tokens, trunk.device)[None],
                position_ids=_tensor(places, trunk.device)[None],
                past_key_values=filling,
                use_cache=True,
                kept=filling,
            ).last_hidden_state[0]

    def _go_on(self) -> Iterator[Event]:
        """One token more of each row whose last one is not kept yet."""
        self._make_room()
        rows = sorted(self.going, key=lambda row: row.voice.adapter)
        if not rows:
            return
        trunk = self.trunk
        stepping = Stepping([row.kept for row in rows], trunk.device)
        tokens = torch.tensor([row.said[-1] if row.said else int(row.prompt[-1]) for row in rows], device=trunk.device)
        places = torch.tensor([row.kept.length for row in rows], device=trunk.device)
        with self.adapters.acting([row.voice.adapter for row in rows], [1] * len(rows)), trunk.autocast():
            hidden = trunk.decoder(
                input_ids=tokens[:, None],
                position_ids=places[:, None],
                past_key_values=stepping,
                use_cache=True,
                kept=stepping,
            ).last_hidden_state[:, 0]
        for row in rows:
            row.kept.length += 1
        yield from self._spoken(rows, hidden)

    def _make_room(self) -> None:
        """For the next token of each row; where there is none, the rows that came last wait again."""
        for row in list(self.going):
            while row.kept is not None and (wider := self.pools.wider(row.kept, row.kept.length + 1)) is None:
                self._give_back((self.filling or self.going)[-1])
            if row.kept is not None:
                row.kept = wider

    def _give_back(self, row: Request) -> None:
        """A row's place; it waits before all others."""
        for rows in (self.filling, self.going):
            if row in rows:
                rows.remove(row)
        row.kept.pool.remove(row.kept)
        row.kept = None
        self.waiting.appendleft(row)

    def _spoken(self, rows: Sequence[Request], states: Tensor) -> Iterator[Event]:
        """What rows say after these hidden states, (b, d), or what they are worth."""
        speaking = [i for i, row in enumerate(rows) if row.head is None]
        for row, state in zip(rows, states, strict=True):
            if row.head is not None:
                row.over = True
                scores = (row.head @ state.to(row.head.dtype)).tolist()
                yield row, Said(end="scored", scores=tuple(scores))
        if speaking:
            rows = [rows[i] for i in speaking]
            logits = self.project(states if len(speaking) == len(states) else states[speaking])
            sound = logits.amax(-1).isfinite().tolist()
            for row, is_sound, said in zip(rows, sound, chosen(rows, logits), strict=True):
                if is_sound:
                    row.said.append(said.token)
                    said = said._replace(end=_end_of(row))
                else:
                    said = Said(end="fault", fault="the model's numbers are not finite")
                row.over = said.end is not None
                yield row, said


def _end_of(row: Request) -> End | None:
    """Why a row that has just said a token is over, if it is."""
    if row.said[-1] in row.voice.ends or row.stopped():
        return "stop"
    return "length" if len(row.said) == row.sampling.max_new else None


def _tensor(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).long().to(device)
