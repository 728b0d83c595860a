"""Divergences in chunks equal those of whole distributions, and so do their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align.objectives.divergences import Head, linear_comparison, linear_divergence

CHUNKS = {"one chunk": 2**20, "chunks of 4": 4 * 4 * 4 * 11}
HEADS = {"plain": {}, "scaled": {"scale": 0.6}, "capped": {"softcap": 2.0}, "both": {"scale": 1.7, "softcap": 2.0}}
MEASURES = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def drawn(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(kind="plain", dtype=torch.float64, rows=11):
    """Student of six features, teacher of eight, which has some rows more in its head."""
    student = Head(drawn(11, 6, seed=1, dtype=dtype), drawn(11, seed=2, dtype=dtype), **HEADS[kind])
    teacher = Head(drawn(rows, 8, seed=3, dtype=dtype), None, scale=0.8)
    return drawn(13, 6, seed=4, dtype=dtype), student, drawn(13, 8, seed=5, dtype=dtype), teacher


def shares(hidden: Tensor, head: Head, rows: int = 11) -> Tensor:
    logits = head.scale * (hidden @ head.weight[:rows].T + (0 if head.bias is None else head.bias[:rows]))
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)).softmax(-1)


def whole(hidden, head, other, other_head, measure, beta) -> Tensor:
    """From the definitions, over the whole vocabulary."""
    s, t = shares(hidden, head), shares(other, other_head)
    m = beta * t + (1 - beta) * s
    kl = lambda p, q: (p * (p / q).log()).sum(-1)  # noqa: E731
    return {"forward": kl(t, s), "reverse": kl(s, t), "jsd": beta * kl(t, m) + (1 - beta) * kl(s, m)}[measure]


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("measure", "beta"), MEASURES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_whole_distributions(kind, measure, beta, chunk, dtype, tolerance):
    hidden, head, other, other_head = made(kind, dtype)
    hidden.requires_grad_()
    found = linear_divergence(hidden, head, other, other_head, measure, beta, chunk)
    expected = whole(hidden, head, other, other_head, measure, beta)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 2, len(hidden), dtype=dtype)
    ours, theirs = (torch.autograd.grad((each * upstream).sum(), hidden)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)
    compared = linear_comparison(hidden, head, other, other_head, measure, beta, chunk)
    for name in ("forward", "reverse"):
        torch.testing.assert_close(
            getattr(compared, name), whole(hidden, head, other, other_head, name, beta), rtol=tolerance, atol=tolerance
        )
    torch.testing.assert_close(compared.loss, found, rtol=tolerance, atol=tolerance)
    same = shares(hidden, head).argmax(-1) == shares(other, other_head).argmax(-1)
    assert compared.agree.bool().equal(same)
    assert 0 < same.sum() < len(same)


def test_a_student_equal_to_its_teacher():
    """Every divergence is 0, and nothing pulls."""
    hidden, head, *_ = made("both")
    hidden.requires_grad_()
    for measure, beta in MEASURES:
        found = linear_divergence(hidden, head, hidden.detach(), head, measure, beta)
        assert found.abs().max() < 1e-12
        assert torch.autograd.grad(found.sum(), hidden)[0].abs().max() < 1e-12
    assert linear_comparison(hidden, head, hidden.detach(), head, "reverse").agree.all()


def test_jsd_lies_between_its_ends():
    """Divided by beta it is near the forward KL for small ones, by 1 - beta near the reverse KL; and it is bounded."""
    hidden, head, other, other_head = made()
    given = hidden, head._replace(scale=0.3), other, other_head._replace(scale=0.3)  # not so far apart
    forward, reverse = (linear_divergence(*given, measure) for measure in ("forward", "reverse"))
    torch.testing.assert_close(linear_divergence(*given, "jsd", 1e-5) / 1e-5, forward, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(linear_divergence(*given, "jsd", 1 - 1e-5) / 1e-5, reverse, rtol=1e-2, atol=1e-3)
    far = given[0], given[1]._replace(weight=50 * given[1].weight), given[2], given[3]._replace(scale=40.0)
    assert linear_divergence(*far, "jsd", 0.5).max() <= math.log(2) + 1e-12


def test_rows_that_only_one_of_the_two_has_are_left_out():
    hidden, head, other, wide = made(rows=14)
    narrow = wide._replace(weight=wide.weight[:11])
    for one, two in ((wide, narrow), (narrow, narrow)):
        assert torch.equal(
            linear_divergence(hidden, head, other, one, "reverse"),
            linear_divergence(hidden, head, other, two, "reverse"),
        )
    fewer = head._replace(weight=head.weight[:9], bias=head.bias[:9])
    assert torch.equal(
        linear_divergence(hidden, head, other, narrow.cut(9), "forward"),
        linear_divergence(hidden, fewer, other, narrow, "forward"),
    )


def test_no_more_than_a_chunk_of_logits_is_held():
    """Whatever the number of positions, no tensor is larger than a chunk or the hidden states."""
    hidden, head = drawn(4000, 6, seed=1).requires_grad_(), Head(drawn(500, 6, seed=2))
    most, sizes = 4 * 40 * 500, []
    with _Sizes(sizes):
        linear_divergence(hidden, head, hidden.detach() + 1, head, "jsd", 0.5, most).sum().backward()
    assert max(sizes) <= max(most // 4, hidden.numel())
    assert len(sizes) > 1000


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the elements of every tensor that is made."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [
            part.numel() for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, Tensor)
        ]
        return out


def test_a_head_that_trains_is_refused():
    hidden, head, other, other_head = made()
    with pytest.raises(AssertionError):
        linear_divergence(hidden, head._replace(weight=head.weight.requires_grad_()), other, other_head, "reverse")
    with pytest.raises(AssertionError):
        linear_divergence(*made(), "jsd", 1.0)
