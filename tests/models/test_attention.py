"""Attention over a forest equals plain masked attention, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from models.tiny import tree
from torch import Tensor

from align.data.trees import Forest, TreeMask, plant
from align.models.attention import Attention, ForestMask, dense_attention, forest_attention

FORESTS = {
    "one text": [tree(13)],
    "texts": [tree(3), tree(11), tree(1)],
    "pairs": [tree(5, 4, 7), tree(9), tree(1, 3, 2), tree(6, 2, 3, 8)],
}


def eager(query, key, value, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """query (1, H, T, D), key and value (1, G, T, D), mask (T, T) True where seen -> (1, T, H, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = scaling * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def compare(
    forest: Forest,
    attend: Attention = dense_attention,
    *,
    heads=4,
    groups=2,
    window=None,
    softcap=None,
    scaling=None,
    dtype=torch.float64,
    tol=1e-12,
):
    length, size = forest.tokens.shape[1], 8
    draw = torch.Generator().manual_seed(3)
    parts = [torch.randn(1, n, length, size, generator=draw, dtype=dtype) for n in (heads, groups, groups)]
    upstream = torch.randn(1, length, heads, size, generator=draw, dtype=dtype)
    mask = TreeMask(forest).dense[0, 0]
    if window is not None:
        positions = forest.positions[0]
        mask = mask & (positions[:, None] - positions < window)
    ours, theirs = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    mask_of = ForestMask(forest, attend=attend)
    found, weights = forest_attention(
        torch.nn.Module(), *ours, None, scaling, sliding_window=window, softcap=softcap, forest=mask_of
    )
    expected = eager(*theirs, mask, size**-0.5 if scaling is None else scaling, softcap)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)
    found.backward(upstream)
    expected.backward(upstream)
    for name, a, b in zip(("query", "key", "value"), ours, theirs, strict=True):
        # Keys' and values' gradients are summed in float32 at most.
        torch.testing.assert_close(
            a.grad, b.grad, rtol=max(tol, 2e-6), atol=max(tol, 2e-6), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("forest", FORESTS)
def test_equals_masked_softmax(forest, groups, window, softcap):
    compare(plant(FORESTS[forest], multiple=8), groups=groups, window=window, softcap=softcap, scaling=0.3)


def test_float32_to_its_rounding_and_the_default_scale():
    compare(plant(FORESTS["pairs"]), dtype=torch.float32, tol=2e-6)


def test_what_a_function_makes_of_a_forest_is_made_once():
    made = []
    mask = ForestMask(plant(FORESTS["texts"]))
    make = lambda forest: made.append(forest) or "it"  # noqa: E731
    assert [mask.made(make), mask.made(make)] == ["it", "it"]
    assert made == [mask.forest]
    assert mask.dense(3) is mask.dense(3)
    assert mask.dense(3).sum() < mask.dense().sum()
