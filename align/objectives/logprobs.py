"""Log-probabilities of labels without ever holding logits for more than one chunk of positions.

Shapes: n labelled positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from mmap import mmap

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 48 * 2**20  # of float32 logits held at once, where the caller does not say


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    entropies: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """log softmax(scale * (hidden @ weight.T + bias))[labels], computed chunk by chunk.

    hidden (n, d), weight (V, d), labels (n,) int64, bias (V,) or None -> (n,) float32 (float64 of float64). `softcap` c
    passes logits through c * tanh(logits / c) (Gemma 2, arXiv 2408.00118). `entropies` (n,) float32 is filled with the
    softmax's entropy at each position, in nats, without gradient. `chunk_bytes` of float32 logits are held at once.

    The gradient of one log-probability with respect to its own hidden state, W[label] - softmax @ W, does not depend
    on what is later done with it. So where the weight is frozen it is taken in the forward pass, while the softmax is
    at hand, and the backward pass is one multiplication for any loss on log-probabilities.
    """
    assert hidden.ndim == 2, hidden.shape
    assert labels.shape == hidden.shape[:1], (labels.shape, hidden.shape)
    assert weight.ndim == 2, weight.shape
    return _LinearLogprobs.apply(hidden, weight, labels, bias, scale, softcap, entropies, chunk_bytes)


@torch.no_grad()
def linear_kl(
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    other_head: tuple[Tensor, Tensor | None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """KL(p || q) over the whole vocabulary at each position, (n,), in nats, without gradient.

    p and q are the softmax of the projection (see `linear_logprobs`) of `hidden` and of `other`, both (n, d);
    `other_head` is weight and bias of the latter where they are not the same.
    """
    assert hidden.shape == other.shape, (hidden.shape, other.shape)
    assert hidden.ndim == 2, hidden.shape
    kl = torch.empty(len(hidden), dtype=wide(weight), device=hidden.device)
    ours, theirs = (Chunks(states, weight, chunk_bytes) for states in (hidden, other))
    head = weight, bias
    for part in ours.parts:
        p, q = (
            capped(chunks.logits(states[part], *head), scale, softcap).log_softmax(-1)
            for chunks, states, head in ((ours, hidden, head), (theirs, other, other_head or head))
        )
        kl[part] = (p.exp() * (p - q)).sum(-1)
    return kl


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Entropy of the softmax of the projection (see `linear_logprobs`) at each position, (n, d) -> (n,), in nats.

    Its gradient with respect to the hidden state is taken in the forward pass too; the weight must be frozen.
    """
    assert hidden.ndim == 2, hidden.shape
    assert not weight.requires_grad, "the head must be frozen"
    return _LinearEntropy.apply(hidden, weight, bias, scale, softcap, chunk_bytes)


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits * scale if scale != 1.0 else logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def wide(weight: Tensor) -> torch.dtype:
    """What sums are taken in: float32, or float64 of float64."""
    return torch.promote_types(weight.dtype, torch.float32)


class Chunks:
    """Goes through positions chunk by chunk, in buffers that are filled anew each time."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_bytes: int, entropies: bool = False) -> None:
        """`entropies`: those of the softmax are asked for, which takes a buffer more."""
        rows = min(len(hidden), max(1, chunk_bytes // (4 * len(weight))))
        self.parts = [slice(first, min(first + rows, len(hidden))) for first in range(0, len(hidden), max(rows, 1))]
        shape, device = (rows, len(weight)), hidden.device
        self.narrow = _buffer(shape, hidden.dtype, device)
        self.wide = self.narrow if wide(weight) == hidden.dtype else _buffer(shape, wide(weight), device)
        self.softmax = _buffer(shape, wide(weight), device) if entropies else self.wide

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """hidden @ weight.T + bias in the wide dtype, (c, V)."""
        narrow = torch.mm(hidden, weight.T, out=self.narrow[: len(hidden)])
        if bias is not None:
            narrow += bias
        return self.wide[: len(hidden)].copy_(narrow) if self.wide is not self.narrow else narrow

    def narrowed(self, gradient: Tensor) -> Tensor:
        """A gradient (c, V) in the dtype of the products."""
        return self.narrow[: len(gradient)].copy_(gradient) if self.wide is not self.narrow else gradient


def _buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor; a large one on a CPU has pages of its own. A heap full of activations has no hole for it, and
    would grow by it."""
    if device.type != "cpu" or (size := math.prod(shape) * dtype.itemsize) < 2**20:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap(-1, size), dtype=dtype).view(shape)


def _log_softmax_parts(logits, labels, scale, softcap, softmax, entropies=None):
    """logits (c, V), overwritten -> logprobs (c,), exp(logits - max) (c, V), its sum (c, 1), slope of the softcap.

    `softmax` (c or more, V) is the buffer for the second, which may be that of the logits; where it is not, `entropies`
    (c,) may be given, to be filled.
    """
    if scale != 1.0:
        logits *= scale
    slope = None
    if softcap is not None:
        logits = torch.tanh_(logits.div_(softcap))
        slope = 1 - logits.square()
        logits *= softcap
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, labels[:, None]) - top
    logits.sub_(top)
    softmax = torch.exp(logits, out=softmax[: len(logits)])
    total = softmax.sum(-1, keepdim=True)
    if entropies is not None:  # log Z - sum of p z
        entropies.copy_(total.log()[:, 0] - logits.mul_(softmax).sum(-1) / total[:, 0])
    return (chosen - total.log())[:, 0], softmax, total, slope


def _logits_gradient(softmax, total, slope, labels, scale):
    """d logprob / d (hidden @ weight.T + bias), (c, V): (one-hot - softmax) times the slopes of softcap and scale."""
    gradient = softmax.div_(-total)
    gradient[torch.arange(len(labels), device=labels.device), labels] += 1
    if slope is not None:
        gradient *= slope
    return gradient if scale == 1.0 else gradient.mul_(scale)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, scale, softcap, entropies, chunk_bytes):
        ctx.scale, ctx.softcap, ctx.chunk_bytes = scale, softcap, chunk_bytes
        ctx.weight_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ahead = hidden.requires_grad and not ctx.weight_trains
        logprobs = torch.empty(len(hidden), dtype=wide(weight), device=hidden.device)
        jacobian = torch.empty_like(hidden) if ahead else None
        chunks = Chunks(hidden, weight, chunk_bytes, entropies is not None)
        for part in chunks.parts:
            logits = chunks.logits(hidden[part], weight, bias)
            filled = None if entropies is None else entropies[part]
            logprobs[part], softmax, total, slope = _log_softmax_parts(
                logits, labels[part], scale, softcap, chunks.softmax, filled
            )
            if ahead:
                gradient = _logits_gradient(softmax, total, slope, labels[part], scale)
                torch.mm(chunks.narrowed(gradient), weight, out=jacobian[part])
        if ahead:
            ctx.save_for_backward(jacobian)
        elif ctx.weight_trains:
            ctx.save_for_backward(hidden, weight, labels, bias)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if not ctx.weight_trains:
            (jacobian,) = ctx.saved_tensors
            return upstream[:, None].to(jacobian.dtype) * jacobian, *[None] * 7
        hidden, weight, labels, bias = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide(weight))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide(weight))
        chunks = Chunks(hidden, weight, ctx.chunk_bytes)
        for part in chunks.parts:
            logits = chunks.logits(hidden[part], weight, bias)
            _, softmax, total, slope = _log_softmax_parts(logits, labels[part], ctx.scale, ctx.softcap, chunks.softmax)
            gradient = _logits_gradient(softmax, total, slope, labels[part], ctx.scale)
            gradient *= upstream[part, None]
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = chunks.narrowed(gradient)
            torch.mm(gradient, weight, out=grad_hidden[part])
            grad_weight += gradient.T @ hidden[part]
        bias_gradient = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, bias_gradient, *[None] * 4


class _LinearEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, scale, softcap, chunk_bytes):
        ahead = hidden.requires_grad
        entropy = torch.empty(len(hidden), dtype=wide(weight), device=hidden.device)
        jacobian = torch.empty_like(hidden) if ahead else None
        chunks = Chunks(hidden, weight, chunk_bytes)
        for part in chunks.parts:
            raw = chunks.logits(hidden[part], weight, bias)
            logprobs = capped(raw, scale, softcap).log_softmax(-1)
            terms = logprobs.exp() * logprobs
            entropy[part] = -terms.sum(-1)
            if ahead:  # d H / d z = -p (log p + H)
                gradient = -(terms + logprobs.exp() * entropy[part, None])
                if softcap is not None:
                    gradient *= 1 - torch.tanh(raw * (scale / softcap)).square()
                torch.mm(chunks.narrowed(gradient.mul_(scale)), weight, out=jacobian[part])
        if ahead:
            ctx.save_for_backward(jacobian)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (jacobian,) = ctx.saved_tensors
        return upstream[:, None].to(jacobian.dtype) * jacobian, *[None] * 5
