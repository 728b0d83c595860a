"""FlexAttention over a packed forest (Dong et al. 2024, arXiv 2412.05496), under a block mask."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.flex_attention import flex_attention_forward

from align.data.trees import TreeMask
from align.models.attention import ForestMask


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """What `dense_attention` computes."""
    blocks = mask.made(TreeMask).block_mask(window)
    return flex_attention_forward(nn.Module(), query, key, value, blocks, scaling=scale, softcap=softcap)[0]
