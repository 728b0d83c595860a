"""Attention over a packed forest: one attention function, registered with transformers, for all model families.

The plain way is PyTorch's own attention under the dense mask of the trees, on every device. Faster functions with the
same numbers stand behind `acceleration.py`; a trunk takes one that agrees with this.

Shapes: H query heads, G key/value heads, T tokens in the row, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from align.data.trees import Forest, TreeMask

NAME = "align_forest"
T = TypeVar("T")


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    `window`: positions back, its own included, that a token sees; `softcap`: scores s become c * tanh(s / c).
    """
    seen = mask.dense(window)
    # Repeated, for under a mask PyTorch's own grouping would write out all scores on a GPU.
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale).transpose(1, 2)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


Attention = Callable[
    [Tensor, Tensor, Tensor, "ForestMask", float, int | None, float | None], Tensor
]  # `dense_attention`, or another with its arguments and values


class ForestMask:
    """What attention needs of a packed batch; made once a forward pass, shared by all layers."""

    def __init__(self, forest: Forest, attend: Attention = dense_attention) -> None:
        self.forest, self.attend = forest, attend
        self._made: dict[Any, Any] = {}

    def made(self, make: Callable[[Forest], T]) -> T:
        """What an attention function makes of the forest, made once."""
        if make not in self._made:
            self._made[make] = make(self.forest)
        return self._made[make]

    def dense(self, window: int | None = None) -> Tensor:
        """(1, 1, T, T) bool, True where the row's token sees the column's: less than `window` positions back."""
        seen = self.made(TreeMask).dense
        if window is None:
            return seen
        if window not in self._made:
            positions = self.forest.positions[0]
            self._made[window] = seen & (positions[:, None] - positions < window)
        return self._made[window]


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: ForestMask | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), in transformers' attention interface."""
    assert forest is not None, "the forest layout was chosen, but the batch came without its mask"
    assert query.shape[0] == 1, query.shape
    assert not dropout, "the trunk's own dropout is off"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotation has left query and key in float32; SDPA would cast as well
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    with torch.autocast(device, enabled=False):
        return forest.attend(query, key, value, forest, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, forest_attention)
