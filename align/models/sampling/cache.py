"""Keys and values while responses are sampled: recorded from a packed prompt pass, then one more token a row a step.

Shapes: B rows, G key/value heads, H query heads, T tokens that there is room for, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

NAME = "align_decode"
STRETCH = 64  # tokens by which the room grows, where steps are not recorded


class Recorder:
    """Takes the place of transformers' cache in the pass over the prompts, and keeps what every layer hands over."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *_more: object) -> tuple[Tensor, Tensor]:
        """(1, G, T, D) each, of all prompts side by side."""
        self.layers[layer] = (key, value)
        return key, value

    def get_seq_length(self, *_layer: int) -> int:
        """Nothing came before."""
        return 0


class KeyValues:
    """One row a response, each as far as its own length; rows are dropped, reordered or doubled."""

    def __init__(self, lengths: Sequence[int], more: int, device: torch.device) -> None:
        """`lengths` of the rows' prompts, whose keys and values are taken next; room for so many `more` tokens."""
        self.lengths = torch.tensor(lengths, device=device)  # (B,) int64, tokens kept
        self._room = max(lengths) + more
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._measure()

    def take(self, recorded: Recorder, first: int, spans: Sequence[tuple[int, int]]) -> None:
        """Prompts of the rows from `first` on: where each stands among the recorded tokens, which are let go."""
        begin, end = torch.tensor(spans, device=self.lengths.device).T
        width = max(stop - start for start, stop in spans)
        places = torch.minimum(begin[:, None] + torch.arange(width, device=begin.device), end[:, None] - 1)  # (b, w)
        for layer in list(recorded.layers):
            given = recorded.layers.pop(layer)
            if layer not in self.layers:
                rows = len(self.lengths)
                self.layers[layer] = tuple(
                    part.new_zeros(rows, part.shape[1], self._room, part.shape[3]) for part in given
                )
            for kept, states in zip(self.layers[layer], given, strict=True):
                chosen = states[0].index_select(1, places.flatten()).unflatten(1, places.shape)  # (G, b, w, D)
                kept[first : first + len(spans), :, :width] = chosen.transpose(0, 1)

    def update(self, key: Tensor, value: Tensor, layer: int, *_more: object) -> tuple[Tensor, Tensor]:
        """(B, G, 1, D) of the newest tokens -> all kept so far with room for more, (B, G, T, D)."""
        for buffer, newest in zip(self.layers[layer], (key, value), strict=True):
            buffer[self.rows, :, self.lengths] = newest[:, :, 0]
        return self.layers[layer]

    def unseen(self, window: int | None) -> Tensor:
        """(B, 1, 1, T) bool, True where a row has no token, or one that lies more than a window back."""
        if window not in self._unseen:
            place = torch.arange(self.room, device=self.lengths.device)[None]
            unseen = place > self.lengths[:, None]
            if window is not None:
                unseen |= place <= self.lengths[:, None] - window
            self._unseen[window] = unseen[:, None, None]
        return self._unseen[window]

    def _measure(self) -> None:
        """What stays so until other rows go on."""
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.longest = int(self.lengths.max())

    def begin(self) -> None:
        """A step: what its layers share is made anew."""
        self._unseen: dict[int | None, Tensor] = {}

    def make_room(self) -> bool:
        """Before every step; whether what is kept moved."""
        if self.longest < self.room:
            return False
        for layer, kept in self.layers.items():  # used whole: a part of them would have to be copied at each step
            self.layers[layer] = tuple(pad(buffer, (0, 0, 0, STRETCH)) for buffer in kept)
        self._room += STRETCH
        return True

    @property
    def room(self) -> int:
        """T."""
        return self._room

    def get_seq_length(self, *_layer: int) -> int:
        """The longest row."""
        return self.longest

    def grow(self) -> None:
        """The newest tokens are kept: after all layers have seen them. Nothing here waits for the device."""
        self.lengths += 1

    def keep(self, rows: Tensor) -> None:
        """Only these rows, (b,) int64, go on, in this order; one may be named several times."""
        self.lengths = self.lengths[rows]
        for layer, (keys, values) in self.layers.items():  # one after the other: never half a cache more
            self.layers[layer] = (keys[rows], values[rows])
        self._measure()


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kept: KeyValues | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """query (B, H, 1, D), key and value (B, G, T, D) -> (B, 1, H, D), each row over its own length."""
    assert kept is not None
    assert query.shape[2] == 1, query.shape
    rows, heads, _, size = query.shape
    groups = key.shape[1]
    scores = query.view(rows, groups, heads // groups, size) @ key.transpose(2, 3)  # (B, G, H / G, T)
    scores = scores.float() * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = scores.masked_fill_(kept.unseen(sliding_window), -torch.inf).softmax(-1).to(value.dtype)
    return (shares @ value).view(rows, 1, heads, size), None


AttentionInterface.register(NAME, decode_attention)
