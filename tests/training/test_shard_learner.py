"""Which process steps which parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from align.training.shard_learner import shared_out


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
def test_parts_are_disjoint_and_even(processes):
    """As of a LoRA of rank 4 in 8 layers, with a head: none is larger than another by more than its smallest."""
    sizes = [4 * width for _ in range(8) for width in (64, 64, 64, 16, 64, 64, 176)] + [64, 1]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parts = shared_out(parameters, processes)
    assert len(parts) == processes
    assert sorted(id(p) for part in parts for p in part) == sorted(map(id, parameters))
    held = [sum(p.numel() for p in part) for part in parts]
    smallest = min((p.numel() for p in parts[held.index(max(held))]), default=0)
    assert max(held) - min(held) <= smallest
    assert max(held) <= sum(sizes) / processes + max(sizes)


def test_parts_are_the_same_in_every_process():
    """Whatever the numbers in them are: sizes and order decide."""
    sizes = (5, 9, 5, 1, 9, 5)
    ours, theirs = ([nn.Parameter(torch.rand(size)) for size in sizes] for _ in range(2))
    (mine, others), (known, _) = shared_out(ours, 2), shared_out(theirs, 2)
    assert [next(i for i, p in enumerate(ours) if p is q) for q in mine] == [1, 0, 5]
    assert [next(i for i, p in enumerate(theirs) if p is q) for q in known] == [1, 0, 5]
    assert [p.numel() for p in others] == [9, 5, 1]


def test_nothing_is_shared_out_where_all_is_sharded():
    assert shared_out([], 2) == [[], []]
