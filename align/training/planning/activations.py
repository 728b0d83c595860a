"""What one row of tokens holds in memory while it is computed and learnt from: a training step on the meta device.

The modules are the real ones, and autograd keeps what it always keeps; only attention is replaced by a function that
keeps what the kernels keep. Every storage that is alive is counted. Layers are alike, so one and two of them are enough.

Shapes: T tokens of the row, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

from align.data.trees import Tree, plant
from align.models.attention import KEPT
from align.models.cpu.blocks import ForestMask
from align.models.cpu.joined import Joined
from align.training.planning.skeleton import Skeleton, plain

ATTENTION = "align_plan"  # the attention function of a model that is only traced
RECURRENT_TOKENS = 32  # of a model that goes token by token, which are then multiplied


class Row(NamedTuple):
    """Bytes of one row, beyond the weights."""

    kept: int  # by a forward pass, for the backward pass
    forward: int  # most, in a forward pass without gradient
    backward: int  # most beyond what is kept, in the backward pass; gradients of weights not counted


class Way(NamedTuple):
    """How a row is computed."""

    dtype: torch.dtype  # of the products
    segments: bool  # attention goes segment by segment, as in `models/attention.py` on a CPU without C kernels
    kernels: bool  # C kernels compute what lies between the products
    autocast: bool = False  # float32 weights are cast for each product


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are let go."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
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
    """A row of `tokens` that is made of texts of `segment` tokens."""
    segment = max(1, min(segment, tokens))
    if not getattr(skeleton.text, "num_attention_heads", None):  # the time of a trace would grow with the tokens
        short = _row(_Key(skeleton), way, RECURRENT_TOKENS, RECURRENT_TOKENS)
        return Row(*(part * tokens // RECURRENT_TOKENS for part in short))
    return _row(_Key(skeleton), way, tokens, segment)


class _Key:
    """A skeleton as a key of the cache."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton, self.key = skeleton, skeleton.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=64)
def _row(key: _Key, way: Way, tokens: int, segment: int) -> Row:
    depth = key.skeleton.text.num_hidden_layers
    one, two = (_traced(key.skeleton, layers, way, tokens, segment) for layers in (1, 2))
    layers = depth - 1
    kept = one.kept + layers * (two.kept - one.kept)
    if way.kernels:  # they keep the product of gate and up besides
        kept += depth * tokens * (getattr(key.skeleton.text, "intermediate_size", 0) or 0) * way.dtype.itemsize
    # What a pass needs at once is that of one layer, however many there are.
    return Row(kept, max(one.forward, two.forward), max(one.backward, two.backward))


def _traced(skeleton: Skeleton, layers: int, way: Way, tokens: int, segment: int) -> Row:
    fast = not skeleton.model.compile and not skeleton.model.quantize
    with FakeTensorMode() if way.autocast else nullcontext():  # the meta device knows no autocast
        device, dtype = ("cpu", torch.float32) if way.autocast else ("meta", way.dtype)
        model = skeleton.made(layers, dtype, fast, device)
        model.train()
        if skeleton.model.gradient_checkpointing:
            plain(model).gradient_checkpointing_enable({"use_reentrant": False})
        with _attending(model, _Attention(way, tokens, segment)):
            return _stepped(model, way, tokens, skeleton.encoder)


def _stepped(model: nn.Module, way: Way, tokens: int, encoder: bool) -> Row:
    device = next(model.parameters()).device
    base = plain(model)
    decoder = getattr(base, base.base_model_prefix)
    given: dict[str, Any] = {"input_ids": torch.zeros(1, tokens, dtype=torch.long, device=device)}
    if not encoder:
        given |= {"position_ids": given["input_ids"].clone(), "use_cache": False}
    own = [*model.parameters(), *model.buffers(), given["input_ids"]]
    own += [module.group.weight for module in model.modules() if isinstance(getattr(module, "group", None), Joined)]

    def passed() -> Tensor:
        with torch.autocast("cpu", way.dtype) if way.autocast else nullcontext():
            return decoder(**given)[0]

    with torch.no_grad(), Live(own) as live:
        passed()
    forward = live.peak
    with Live(own) as live:
        states = passed()
        kept = live.now
        above = torch.empty_like(states)
        live.peak = live.now
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = _Weights(trained)
        with weights.dropped(live):
            states.backward(above)
    return Row(kept, forward, live.peak - kept)


class _Weights:
    """Gradients of weights, let go as soon as they are there: a plan counts them by themselves."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self.trained = trained

    @contextmanager
    def dropped(self, live: Live) -> Iterator[None]:
        def drop(p: Tensor) -> None:
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(drop) for p in self.trained]
        yield
        for hook in hooks:
            hook.remove()


class _Attention:
    """transformers' interface for attention, with the memory of ours."""

    def __init__(self, way: Way, tokens: int, segment: int) -> None:
        self.mask = None
        if way.segments:
            lengths = [segment] * (tokens // segment) + [tokens % segment] * bool(tokens % segment)
            trees = [Tree((np.zeros(n, np.int32),), (np.ones(n, bool),)) for n in lengths]
            self.mask = ForestMask(plant(trees))

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_more: object, **_named: object):
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
        kind = _Kernel if self.mask is None else _Segments
        return kind.apply(query, key, value, self.mask), None


class _Kernel(torch.autograd.Function):
    """FlexAttention, SDPA and the C kernels keep their operands, the result, and a logarithm a query and head."""

    @staticmethod
    def forward(ctx, query, key, value, _mask):
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        logsum = query.new_empty(query.shape[1], query.shape[2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsum)
        return out

    @staticmethod
    def backward(ctx, above):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Segments(torch.autograd.Function):
    """`_BlockAttention` of models/attention.py: stacks and probabilities are kept where they are small."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
        numbers = mask.size(heads, groups, size)
        ctx.keeps, ctx.numbers, ctx.mask = numbers <= KEPT * query.numel(), numbers, mask
        ctx.shapes = query.shape, key.shape, value.shape
        flat = [part.new_empty(part.numel()) for part in (query, key, value)]
        stacks = query.new_empty(numbers)
        largest = _largest(mask, heads)
        work = [query.new_empty(largest) for _ in range(2)]  # scores with their bias
        del flat, work
        seen = query.new_empty(sum(stack.queries.numel() for stack in mask.stacks) * heads * size)
        out = query.new_empty(1, query.shape[2], heads, value.shape[3])
        del seen
        ctx.save_for_backward(*([stacks] if ctx.keeps else [query, key, value]))
        return out

    @staticmethod
    def backward(ctx, above):
        (heads, groups), size = (ctx.shapes[0][1], ctx.shapes[1][1]), ctx.shapes[0][3]
        stacks = above.new_empty(0 if ctx.keeps else _stack_numbers(ctx.mask, heads, groups, size))
        grads = above.new_empty(_grad_numbers(ctx.mask, heads, groups, size))
        work = [above.new_empty(_largest(ctx.mask, heads)) for _ in range(3)]  # probabilities and their slopes
        del work, stacks
        out = [above.new_empty(shape) for shape in ctx.shapes]
        del grads
        return *out, None


def _largest(mask: ForestMask, heads: int) -> int:
    """Probabilities of the largest stack."""
    return heads * max(stack.queries.numel() * stack.keys.shape[1] for stack in mask.stacks)


def _stack_numbers(mask: ForestMask, heads: int, groups: int, size: int) -> int:
    """Queries, keys and values of the largest stack."""
    return max(size * (heads * stack.queries.numel() + 2 * groups * stack.keys.numel()) for stack in mask.stacks)


def _grad_numbers(mask: ForestMask, heads: int, groups: int, size: int) -> int:
    """Gradients of all stacks' queries, keys and values."""
    return sum(size * (heads * stack.queries.numel() + 2 * groups * stack.keys.numel()) for stack in mask.stacks)


@contextmanager
def _attending(model: nn.Module, function: _Attention) -> Iterator[None]:
    AttentionInterface.register(ATTENTION, function)
    plain(model).set_attn_implementation(ATTENTION)
    yield
