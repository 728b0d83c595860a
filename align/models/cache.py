"""Keys and values while responses are sampled: recorded from a packed prompt pass, then one more token a row a step.

Shapes: B rows, G key/value heads, H query heads, T tokens kept at most, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "align_decode"


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
    """One row a response, each as far as its own length; rows are dropped when they are done."""

    def __init__(self, recorded: Recorder, spans: list[tuple[int, int]], room: int) -> None:
        """`spans`: for each row where its prompt stands among the recorded tokens; `room`: T."""
        self.lengths = torch.tensor([last - first for first, last in spans])  # (B,) int64, tokens kept
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in list(recorded.layers):
            kept = []
            for states in recorded.layers.pop(layer):
                buffer = states.new_zeros(len(spans), states.shape[1], room, states.shape[3])
                for row, (first, last) in enumerate(spans):
                    buffer[row, :, : last - first] = states[0, :, first:last]
                kept.append(buffer)
            self.layers[layer] = (kept[0], kept[1])
        self.lengths = self.lengths.to(kept[0].device)

    def update(self, key: Tensor, value: Tensor, layer: int, *_more: object) -> tuple[Tensor, Tensor]:
        """(B, G, 1, D) of the newest tokens -> all kept so far, (B, G, t, D), t the longest row with its newest."""
        rows = torch.arange(len(key), device=key.device)
        longest = int(self.lengths.max()) + 1
        for buffer, newest in zip(self.layers[layer], (key, value), strict=True):
            buffer[rows, :, self.lengths] = newest[:, :, 0]
        keys, values = self.layers[layer]
        return keys[:, :, :longest], values[:, :, :longest]

    def get_seq_length(self, *_layer: int) -> int:
        """The longest row."""
        return int(self.lengths.max())

    def grow(self) -> None:
        """The newest tokens are kept: after all layers have seen them."""
        self.lengths += 1

    def keep(self, rows: Tensor) -> None:
        """Only these rows, (b,) int64, go on."""
        self.lengths = self.lengths[rows]
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


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
    """query (B, H, 1, D), key and value (B, G, t, D) -> (B, 1, H, D), each row over its own length."""
    assert kept is not None
    assert query.shape[2] == 1, query.shape
    rows, heads, _, size = query.shape
    groups, length = key.shape[1:3]
    place = torch.arange(length, device=query.device)[None]
    hidden = place > kept.lengths[:, None]  # (B, t)
    if sliding_window is not None:
        hidden |= place <= kept.lengths[:, None] - sliding_window
    scores = query.view(rows, groups, heads // groups, size) @ key.transpose(2, 3)  # (B, G, H / G, t)
    scores = scores.float() * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shares = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).to(value.dtype)
    return (shares @ value).view(rows, 1, heads, size), None


AttentionInterface.register(NAME, decode_attention)
