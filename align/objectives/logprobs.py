"""Log-probabilities of labels without ever holding logits for more than one chunk of positions.

Shapes: n labelled positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20  # of float32 logits held at once


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(scale * (hidden @ weight.T + bias))[labels], computed chunk by chunk.

    hidden (n, d), weight (V, d), labels (n,) int64, bias (V,) or None -> (n,) float32 (float64 of float64). `softcap` c
    passes logits through c * tanh(logits / c) (Gemma 2, arXiv 2408.00118).

    The gradient of one log-probability with respect to its own hidden state, W[label] - softmax @ W, does not depend
    on what is later done with it. So where the weight is frozen it is taken in the forward pass, while the softmax is
    at hand, and the backward pass is one multiplication for any loss on log-probabilities.
    """
    assert hidden.ndim == 2, hidden.shape
    assert labels.shape == hidden.shape[:1], (labels.shape, hidden.shape)
    assert weight.ndim == 2, weight.shape
    return _LinearLogprobs.apply(hidden, weight, labels, bias, scale, softcap)


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _wide(weight: Tensor) -> torch.dtype:
    """What sums are taken in: float32, or float64 of float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def _log_softmax_parts(hidden, weight, labels, bias, scale, softcap):
    """-> logprobs (c,), softmax (c, V) float32, d logits / d raw logits (c, V) or None, each for one chunk."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(_wide(weight))
    if scale != 1.0:
        logits *= scale
    slope = None
    if softcap is not None:
        logits = torch.tanh_(logits.div_(softcap))
        slope = 1 - logits.square()
        logits *= softcap
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, labels[:, None]) - top
    softmax = logits.sub_(top).exp_()
    total = softmax.sum(-1, keepdim=True)
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
    def forward(ctx, hidden, weight, labels, bias, scale, softcap):
        ctx.scale, ctx.softcap = scale, softcap
        ctx.weight_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ahead = hidden.requires_grad and not ctx.weight_trains
        logprobs = torch.empty(len(hidden), dtype=_wide(weight), device=hidden.device)
        jacobian = torch.empty_like(hidden) if ahead else None
        for part in _chunks(len(hidden), len(weight)):
            logprobs[part], softmax, total, slope = _log_softmax_parts(
                hidden[part], weight, labels[part], bias, scale, softcap
            )
            if ahead:
                gradient = _logits_gradient(softmax, total, slope, labels[part], scale)
                jacobian[part] = gradient.to(weight.dtype) @ weight
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
            return upstream[:, None].to(jacobian.dtype) * jacobian, None, None, None, None, None
        hidden, weight, labels, bias = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight))
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=_wide(weight))
        for part in _chunks(len(hidden), len(weight)):
            _, softmax, total, slope = _log_softmax_parts(
                hidden[part], weight, labels[part], bias, ctx.scale, ctx.softcap
            )
            gradient = _logits_gradient(softmax, total, slope, labels[part], ctx.scale)
            gradient *= upstream[part, None]
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            grad_hidden[part] = gradient @ weight
            grad_weight += gradient.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, grad_bias, None, None
