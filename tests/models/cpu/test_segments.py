"""Attention segment by segment equals plain masked attention, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.test_attention import FORESTS
from models.test_attention import compare as compare_attention
from models.tiny import tree

from align.data.trees import TreeMask, plant
from align.models.cpu import blocks, segments
from align.models.cpu.blocks import Blocks
from align.models.cpu.segments import segment_attention

LENGTH = st.integers(1, 9)
SHAPES = st.lists(st.tuples(LENGTH, st.lists(LENGTH, max_size=3)), min_size=1, max_size=4)


def compare(forest, **options) -> None:
    compare_attention(forest, segment_attention, **options)


@pytest.fixture(params=[(256, 0), (4, 0), (4, 1e9)], ids=["whole segments", "blocks of 4", "probabilities kept"])
def blocked(request, monkeypatch):
    most, kept = request.param
    monkeypatch.setattr(blocks, "QUERY_BLOCK", most)
    monkeypatch.setattr(segments, "KEPT", kept)


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
        mask = Blocks(forest)
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
