"""Advantages of groups, by hand and by the identities that tie them together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from align.objectives.groups import centred, equal, leave_one_out, of_batch, overlong, standardised

SCORES = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
GROUPS = arrays("float64", st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.integers(-50, 50)).map(
    torch.tensor
)


def close(found: Tensor, expected) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-6)


def test_by_hand():
    """Mean 3 and variance 7 of the first group; mean 3.5 and variance 3.1 of all six."""
    close(centred(SCORES), [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]])
    close(leave_one_out(SCORES), [[1 - 4.0, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]])
    spread = 7**0.5 + 1e-4
    close(standardised(SCORES), [[-2 / spread, -1 / spread, 3 / spread], [0.0, 0.0, 0.0]])
    spread = 3.1**0.5 + 1e-4
    close(of_batch(SCORES) * spread, [[-2.5, -1.5, 2.5], [0.5, 0.5, 0.5]])


@given(GROUPS)
def test_identities(scores):
    """A group's advantages sum to 0; the one left out makes k / (k - 1) times the centred ones; of all, mean 0."""
    count = scores.shape[1]
    for advantages in (centred(scores), leave_one_out(scores), standardised(scores)):
        close(advantages.sum(1), torch.zeros(len(scores)))
    torch.testing.assert_close(leave_one_out(scores), centred(scores) * count / (count - 1))
    spread = scores.std(1)
    close(standardised(scores).std(1), spread / (spread + 1e-4))
    close(of_batch(scores).mean(), 0.0)
    # Neither a constant nor a scale changes what is standardised, but for the 1e-4.
    torch.testing.assert_close(standardised(3 * scores + 5), standardised(scores), rtol=1e-3, atol=1e-3)


def test_equal_scores_are_found_in_spite_of_rounding():
    scores = torch.tensor([[0.1 + 0.2, 0.3], [0.3, 0.301], [1e7, 1e7 + 1], [0.0, 0.0]])
    assert equal(scores).tolist() == [True, False, True, True]
    assert not standardised(scores)[equal(scores)].any()


NAN = float("nan")


@settings(max_examples=40)
@given(GROUPS, st.data())
def test_responses_without_a_score_are_no_part_of_their_group(scores, draw):
    """Advantages of the others are as if it had not been sampled; alone they are 0."""
    known = draw.draw(arrays("bool", tuple(scores.shape)).filter(lambda mask: mask.any()).map(torch.tensor))
    holed = scores.masked_fill(~known, NAN)
    for function in (centred, leave_one_out, standardised):
        found = function(holed)
        for row, own, there in zip(found, scores, known, strict=True):
            several = int(there.sum()) > 1
            expected = function(own[there][None])[0] if several else torch.zeros(int(there.sum()))
            torch.testing.assert_close(row[there], expected.to(row.dtype), rtol=1e-9, atol=1e-9)
            assert row[~there].isnan().all()
    torch.testing.assert_close(of_batch(holed)[known], of_batch(scores[known][None])[0])
    alike = [len(set(own[there].tolist())) < 2 for own, there in zip(scores, known, strict=True)]
    assert equal(holed).tolist() == alike


def test_a_single_response():
    """It has nothing beside it in its group, and in a batch of its own no spread."""
    assert of_batch(torch.tensor([[2.0]])).tolist() == [[0.0]]
    for function in (standardised, leave_one_out):
        with pytest.raises(AssertionError):
            function(torch.tensor([[2.0], [3.0]]))
    with pytest.raises(AssertionError):
        centred(torch.zeros(3))


def test_overlong_by_hand():
    """Of at most 10 tokens, the last four."""
    lengths = torch.tensor([1, 6, 7, 9, 10])
    assert overlong(lengths, 10, 4).tolist() == [0.0, 0.0, 0.25, 0.75, 1.0]
    assert overlong(lengths, 10, 10).tolist() == pytest.approx([0.1, 0.6, 0.7, 0.9, 1.0])
