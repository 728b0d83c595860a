"""Attention over a forest equals plain masked attention, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.tiny import tree
from torch import Tensor

from align.data.trees import Forest, TreeMask, plant
from align.models import attention
from align.models.attention import forest_attention
from align.models.cpu import blocks
from align.models.cpu.blocks import ForestMask

FORESTS = {
    "one text": [tree(13)],
    "texts": [tree(3), tree(11), tree(1)],
    "pairs": [tree(5, 4, 7), tree(9), tree(1, 3, 2), tree(6, 2, 3, 8)],
}
LENGTH = st.integers(1, 9)
SHAPES = st.lists(st.tuples(LENGTH, st.lists(LENGTH, max_size=3)), min_size=1, max_size=4)


def eager(query, key, value, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """query (1, H, T, D), key and value (1, G, T, D), mask (T, T) True where seen -> (1, T, H, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = scaling * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def compare(
    forest: Forest, *, heads=4, groups=2, window=None, softcap=None, scaling=None, dtype=torch.float64, tol=1e-12
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
    found, weights = forest_attention(
        torch.nn.Module(), *ours, None, scaling, sliding_window=window, softcap=softcap, forest=ForestMask(forest)
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


@pytest.fixture(params=[(256, 0), (4, 0), (4, 1e9)], ids=["whole segments", "blocks of 4", "probabilities kept"])
def blocked(request, monkeypatch):
    most, kept = request.param
    monkeypatch.setattr(blocks, "QUERY_BLOCK", most)
    monkeypatch.setattr(attention, "KEPT", kept)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.usefixtures("blocked")
def test_equals_masked_softmax(forest, groups, window, softcap):
    compare(plant(FORESTS[forest], multiple=8), groups=groups, window=window, softcap=softcap, scaling=0.3)


def test_float32_to_its_rounding_and_the_default_scale():
    compare(plant(FORESTS["pairs"]), dtype=torch.float32, tol=2e-6)


def test_segments_longer_than_a_block():
    forest = plant([tree(600), tree(300, 270, 5)])
    compare(forest, heads=2, groups=1, dtype=torch.float32, tol=1e-5)
    compare(forest, heads=2, groups=1, window=100, dtype=torch.float32, tol=1e-5)


def test_bfloat16_stays_near():
    compare(plant(FORESTS["pairs"]), dtype=torch.bfloat16, tol=0.06)


@given(SHAPES, st.integers(1, 8), st.integers(1, 4), st.sampled_from([0, 200, 10_000]), st.sampled_from([1, 32]))
def test_blocks_cover_the_dense_mask_and_nothing_else(shapes, multiple, most, small, keys_of):
    forest = plant([tree(stem, *branches) for stem, branches in shapes], multiple=multiple)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("QUERY_BLOCK", most), ("SMALL", small), ("KEY_MULTIPLE", keys_of)):
            patch.setattr(blocks, name, value)
        mask = ForestMask(forest)
        assert mask.stacks  # they are made when they are first asked for
    seen = torch.zeros(forest.tokens.shape[1], forest.tokens.shape[1], dtype=torch.int64)
    answered = []
    for number, stack in enumerate(mask.stacks):
        assert stack.queries.shape[1] <= most
        assert stack.keys.shape[1] % keys_of == 0
        bias = mask.bias(number, None, torch.float32)[:, 0]
        assert (bias == 0).any(-1).all(), "a query that fills up sees something too, or its softmax is not a number"
        for block, (queries, _) in enumerate(stack.counts):
            answered += stack.queries[block, :queries].tolist()
            for query in range(queries):
                seen[stack.queries[block, query], stack.keys[block][bias[block, query] == 0]] += 1
    assert sorted(answered) == list(range(forest.tokens.shape[1]))
    assert torch.equal(seen, TreeMask(forest).dense[0, 0].long())


def test_blocks_of_like_size_share_a_stack_and_others_do_not(monkeypatch):
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 256)
    of_pairs = blocks.forest_blocks((100, 40, 44, 97, 42, 41, 200), (-1, 0, 0, -1, 3, 3, -1))
    sizes = [sorted((block.queries, block.keys) for block in stack) for stack in blocks.stacked(of_pairs)]
    assert sizes == [[(200, 200)], [(97, 97), (100, 100)], [(40, 140), (41, 138), (42, 139), (44, 144)]]
