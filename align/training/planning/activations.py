"""What one row of tokens holds in memory while it is computed and learnt from: a training step on the meta device.

The modules are the real ones, and autograd keeps what it always keeps. Attention alone is replaced by a function that
keeps what the kernels keep. Every storage that is alive is counted. Layers are alike, so one and two of them suffice.

Shapes: T tokens of the row, H query heads, D head size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

from align.data.trees import Tree, plant
from align.models.acceleration import offer
from align.models.attention import ForestMask
from align.training.planning.skeleton import Skeleton, plain

ATTENTION = "align_traced"
TRACED = 64, 4096  # tokens of a trace
RECURRENT_TOKENS = 32  # of a model that goes token by token, which are then multiplied


class Row(NamedTuple):
    """Bytes of one row, beyond the weights."""

    kept: int  # by a forward pass, for the backward pass
    forward: int  # most, in a forward pass without gradient
    backward: int  # most beyond what is kept, in the backward pass; gradients of weights not counted


class Way(NamedTuple):
    """How a row is computed."""

    device: str  # type of the device
    dtype: torch.dtype  # of the products
    kernels: bool = False  # C kernels compute what lies between the products
    autocast: bool = False  # float32 weights are cast for each product


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are let go."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """`known`: what was there before, and does not count."""
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for part in tree_iter(out):
            if isinstance(part, Tensor):
                self._note(part.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def row(skeleton: Skeleton, way: Way, tokens: int, segment: int) -> Row:
    """A row of `tokens` that is made of texts of `segment` tokens, from the trace of one with fewer: a power of two, so
    that few traces serve many rows."""
    if not getattr(skeleton.text, "num_attention_heads", None):  # a trace would take as long as there are tokens
        fewer = segment = RECURRENT_TOKENS
    else:
        fewer = min(max(2 ** round(math.log2(max(tokens, 1))), TRACED[0]), TRACED[1])
        segment = fewer if _maskless(way) else min(fewer, 2 ** round(math.log2(max(segment, 1))))
    return Row(*(part * tokens // fewer for part in _row(skeleton, way, fewer, segment)))


@lru_cache(maxsize=64)
def _row(skeleton: Skeleton, way: Way, tokens: int, segment: int) -> Row:
    config = skeleton.text
    depth = config.num_hidden_layers
    one, two = (_traced(skeleton, layers, way, tokens, segment) for layers in (1, 2))
    kept = one.kept + (depth - 1) * (two.kept - one.kept)
    if way.kernels and not skeleton.model.quantize:  # they keep the product of gate and up besides
        kept += depth * tokens * (getattr(config, "intermediate_size", 0) or 0) * way.dtype.itemsize
    # What a pass needs at once is that of one layer, however many there are.
    return Row(kept, max(one.forward, two.forward), max(one.backward, two.backward))


def _traced(skeleton: Skeleton, layers: int, way: Way, tokens: int, segment: int) -> Row:
    with FakeTensorMode() if way.autocast else nullcontext():  # the meta device knows no autocast
        kernel = kernel_attention if _maskless(way) else offer(torch.device(way.device)).traced
        AttentionInterface.register(ATTENTION, partial(_attention, kernel, _mask(tokens, segment)))
        model = (_made.__wrapped__ if way.autocast else _made)(skeleton, layers, way)  # what a mode makes ends with it
        return _stepped(model, plain(model), way, tokens, skeleton.encoder)


def _maskless(way: Way) -> bool:
    """Whether attention keeps the same, however the texts of a row are divided."""
    return way.kernels or offer(torch.device(way.device)).traced is None


@lru_cache(maxsize=4)
def _made(skeleton: Skeleton, layers: int, way: Way) -> nn.Module:
    """The model of a trace, ready to be trained: to make it takes as long as to trace it."""
    device, dtype = ("cpu", torch.float32) if way.autocast else ("meta", way.dtype)
    model = skeleton.made(layers, dtype, device)
    base = plain(model)
    if not way.autocast and not skeleton.model.quantize:  # peft's own layers compute on packed weights
        offer(torch.device(way.device)).adopt(base, True)
    model.train()
    if skeleton.model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    base.set_attn_implementation(ATTENTION)
    for p in model.parameters():
        if p.requires_grad:  # a plan counts gradients of weights by themselves
            p.register_post_accumulate_grad_hook(_drop)
    return model


def _stepped(model: nn.Module, base: nn.Module, way: Way, tokens: int, encoder: bool) -> Row:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
    given: dict[str, Any] = {"input_ids": ids}
    if not encoder:
        given |= {"position_ids": ids, "use_cache": False}
    decoder = getattr(base, base.base_model_prefix)
    own = [*model.parameters(), *model.buffers(), ids]
    own += [t for m in model.modules() for t in vars(getattr(m, "group", None) or _Nothing).values() if _is_tensor(t)]

    def passed() -> Tensor:
        with torch.autocast("cpu", way.dtype) if way.autocast else nullcontext():
            return decoder(**given)[0]

    with torch.no_grad(), Live(own) as live:
        passed()
    forward = live.peak
    with Live(own) as live:
        states = passed()
        kept = live.now
        if not states.requires_grad:
            return Row(0, forward, 0)
        above = torch.empty_like(states)
        live.peak = live.now
        states.backward(above)
    return Row(kept, forward, live.peak - kept)


class _Nothing:
    """What has no tensors."""


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _drop(p: Tensor) -> None:
    p.grad = None


def _mask(tokens: int, segment: int) -> ForestMask:
    lengths = [segment] * (tokens // segment) + [tokens % segment] * bool(tokens % segment)
    return ForestMask(plant([Tree((np.zeros(n, np.int32),), (np.ones(n, bool),)) for n in lengths]))


def _attention(
    kernel: object, mask: ForestMask, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_, **named
):
    """transformers' interface for attention."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    return kernel(query, key, value, mask, 1.0, None, named.get("softcap")), None


def kernel_attention(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """The memory of FlexAttention, SDPA and the C kernels: query (1, H, T, D) -> (1, T, H, D)."""
    return _Kernel.apply(query, key, value)


class _Kernel(torch.autograd.Function):
    """Operands and result are kept, and a logarithm for each query and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        logsum = query.new_empty(query.shape[1], query.shape[2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsum)
        return out

    @staticmethod
    def backward(ctx, above):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
