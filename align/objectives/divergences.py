"""How far a student's whole distribution is from a teacher's at each position, without ever holding logits for more
than one chunk of positions.

Shapes: n positions; d and e hidden sizes of student and teacher; V vocabulary, the one that both have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from align.objectives.logprobs import CHUNK_BYTES, Chunks, capped, wide

Measure = Literal["forward", "reverse", "jsd"]


class Head(NamedTuple):
    """What makes logits of hidden states: scale * (h @ weight.T + bias), passed through c * tanh(logits / c)."""

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def cut(self, rows: int) -> Head:
        """Of the first tokens alone."""
        return self._replace(weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows])


class Compared(NamedTuple):
    """Of student and teacher at each position, (n,) each, without gradient."""

    loss: Tensor  # the divergence that is asked for
    forward: Tensor  # KL(teacher, student), in nats
    reverse: Tensor  # KL(student, teacher)
    agree: Tensor  # 1 where both find the same token likeliest


def linear_divergence(
    hidden: Tensor,
    head: Head,
    other: Tensor,
    other_head: Head,
    measure: Measure,
    beta: float = 0.5,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The divergence of the student's softmax S from the teacher's T at each position, (n,), in nats.

    S comes from `hidden` (n, d), T from `other` (n, e), both under their heads, the student's frozen. `measure`:

        forward   KL(T || S) = sum T (log T - log S)
        reverse   KL(S || T)
        jsd       b KL(T || M) + (1 - b) KL(S || M), with M = b T + (1 - b) S

    Agarwal et al. 2023, "On-policy distillation of language models" (arXiv 2306.13649), eq. 1: for small b, jsd is
    b times the forward KL, for b near 1 it is 1 - b times the reverse one. The gradient with respect to `hidden` is
    taken in the forward pass, while both distributions are at hand; tokens that only one of the two has are left out.
    """
    assert hidden.ndim == other.ndim == 2, (hidden.shape, other.shape)
    assert len(hidden) == len(other), (hidden.shape, other.shape)
    assert 0 < beta < 1 or measure != "jsd", beta
    assert not head.weight.requires_grad, "the head must be frozen"
    return _LinearDivergence.apply(hidden, head, other.detach(), other_head, measure, beta, chunk_bytes)


@torch.no_grad()
def linear_comparison(
    hidden: Tensor,
    head: Head,
    other: Tensor,
    other_head: Head,
    measure: Measure,
    beta: float = 0.5,
    chunk_bytes: int = CHUNK_BYTES,
) -> Compared:
    """`linear_divergence`, both KL divergences, and where student and teacher agree."""
    empty = torch.empty(len(hidden), dtype=wide(head.weight), device=hidden.device)
    found = Compared(*(empty.clone() for _ in Compared._fields))
    for part, _, _, student, teacher in _log_softmaxes(hidden, head, other, other_head, chunk_bytes):
        found.loss[part], _ = _measured(student, teacher, measure, beta, False)
        found.agree[part] = (student.argmax(-1) == teacher.argmax(-1)).to(empty.dtype)
        apart = teacher - student
        found.forward[part] = (teacher.exp() * apart).sum(-1)
        found.reverse[part] = -(student.exp() * apart).sum(-1)
    return found


def _log_softmaxes(
    hidden: Tensor, head: Head, other: Tensor, other_head: Head, chunk_bytes: int
) -> Iterator[tuple[slice, Chunks, Tensor, Tensor, Tensor]]:
    """Chunk by chunk: its positions, the student's buffers, its raw logits (c, V), and log S and log T (c, V)."""
    rows = min(len(head.weight), len(other_head.weight))
    head, other_head = head.cut(rows), other_head.cut(rows)
    # A chunk holds about six such arrays at once.
    ours, theirs = (
        Chunks(states, own.weight, chunk_bytes // 4) for states, own in ((hidden, head), (other, other_head))
    )
    for part in ours.parts:
        raw = ours.logits(hidden[part], head.weight, head.bias)
        student = capped(raw, head.scale, head.softcap).log_softmax(-1)
        logits = theirs.logits(other[part], other_head.weight, other_head.bias)
        yield (
            part,
            ours,
            raw,
            student,
            capped(logits, other_head.scale, other_head.softcap).log_softmax(-1).to(student),
        )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, other, other_head, measure, beta, chunk_bytes):
        ahead = hidden.requires_grad
        divergence = torch.empty(len(hidden), dtype=wide(head.weight), device=hidden.device)
        jacobian = torch.empty_like(hidden) if ahead else None
        for part, chunks, raw, student, teacher in _log_softmaxes(hidden, head, other, other_head, chunk_bytes):
            divergence[part], gradient = _measured(student, teacher, measure, beta, ahead)
            if ahead:
                if head.softcap is not None:
                    gradient *= 1 - torch.tanh(raw * (head.scale / head.softcap)).square()
                narrow = chunks.narrowed(gradient.mul_(head.scale))
                torch.mm(narrow, head.weight[: narrow.shape[1]], out=jacobian[part])
        if ahead:
            ctx.save_for_backward(jacobian)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (jacobian,) = ctx.saved_tensors
        return upstream[:, None].to(jacobian.dtype) * jacobian, *[None] * 6


def _measured(
    student: Tensor, teacher: Tensor, measure: Measure, beta: float, ahead: bool
) -> tuple[Tensor, Tensor | None]:
    """log S, log T (c, V) -> the divergence (c,), and if wanted its gradient by the student's logits (c, V)."""
    if measure == "forward":
        shares = teacher.exp()
        return (shares * (teacher - student)).sum(-1), student.exp() - shares if ahead else None
    shares = student.exp()
    if measure == "reverse":
        slope = student - teacher  # d D / d S, but for a constant
        divergence = (shares * slope).sum(-1)
    else:
        mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        slope = (1 - beta) * (student - mixed)
        divergence = (shares * slope).sum(-1) + beta * (teacher.exp() * (teacher - mixed)).sum(-1)
    if not ahead:
        return divergence, None
    return divergence, shares * (slope - (shares * slope).sum(-1, keepdim=True))
