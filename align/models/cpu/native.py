"""What `kernels/*.c` compute, for tensors: what lies between the large products on a CPU in bfloat16.

PyTorch takes some ten passes over memory for a norm, and many small products for attention over short segments or for
a LoRA; these take one. Ask `serve` (see compiled.py) first.

Shapes: n rows, d numbers a row; H query heads, G key/value heads, T tokens, D head size; layers of one input with i
inputs, O outputs and R ranks in all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.models.cpu.blocks import Blocks
from align.models.cpu.compiled import LANES, call, serve


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((name, c_int64) for name in ("query_row", "key_row", "value_row")),
        *((name, c_void_p) for name in ("blocks", "spans")),
        *((name, c_int64) for name in ("heads", "groups", "size")),
        ("scale", c_float),
    ]


class _Lora(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "inputs", "outputs", "rank")),
        *((name, c_void_p) for name in ("a", "b", "ranks", "heights")),
        ("scale", c_float),
    ]


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (…, d) -> w * x / rms(x) and 1 / rms(x), (…, 1) float32."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
    call("norm_forward", x, weight, out, scale, scale.numel(), x.shape[-1], float(eps))
    return out, scale


def norm_backward(above: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x, (…, d)."""
    above, x, out = above.contiguous(), x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    call("norm_backward", above, x, weight, scale, out, scale.numel(), x.shape[-1])
    return out


def gated(both: Tensor) -> Tensor:
    """Gate and up side by side, (n, 2 d) -> silu(gate) * up, (n, d)."""
    n, d = both.shape[0], both.shape[1] // 2
    out = torch.empty(n, d, dtype=both.dtype)
    call("gated_forward", both, both.stride(0), out, n, d)
    return out


def gated_backward(both: Tensor, above: Tensor) -> Tensor:
    """The gradient of `both`, (n, 2 d), from that of silu(gate) * up, `above` (n, d)."""
    below = torch.empty_like(both)
    call("gated_backward", both, above, below, *above.shape)
    return below


def attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), and what `attention_backward` needs, (T, H)
    float32."""
    _, heads, tokens, size = query.shape
    out = torch.empty(1, tokens, heads, size, dtype=query.dtype)
    logsum = torch.empty(tokens, heads, dtype=torch.float32)
    about, _kept = _attention(query, key, value, blocks, scale)
    call("attention_forward", about, len(blocks.walks.blocks), out, logsum)
    return out, logsum


def attention_backward(
    above: Tensor, given: tuple[Tensor, Tensor, Tensor], blocks: Blocks, scale: float, out: Tensor, logsum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, which were `given`, from that of `out`, `above` (1, T, H, D)."""
    query, key, value = given
    _, heads, tokens, size = query.shape
    above, trees = above.contiguous(), blocks.walks.trees
    of_keys, of_values = torch.empty(2, tokens, heads, size, dtype=torch.float32)
    grads = [torch.empty(1, tokens, part.shape[1], size, dtype=part.dtype) for part in (query, key, value)]
    about, _kept = _attention(query, key, value, blocks, scale)
    about_trees = (trees, len(trees) - 1, tokens)
    call("attention_backward", about, *about_trees, out, logsum, above, of_keys, of_values, *grads)
    return tuple(grad.transpose(1, 2) for grad in grads)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float
) -> tuple[_Attention, list[Tensor]]:
    """What both directions take, and the tensors that it points into."""
    lines, strides = zip(*map(_by_token, (query, key, value)), strict=True)
    kept = [*lines, blocks.walks.blocks, blocks.walks.spans]
    places, (blocks, spans) = [part.data_ptr() for part in lines], [part.data_ptr() for part in kept[3:]]
    shape = (query.shape[1], key.shape[1], query.shape[-1])
    return _Attention(*places, *strides, blocks, spans, *shape, scale), kept


def _by_token(x: Tensor) -> tuple[Tensor, int]:
    """(R, H, T, D) as it can be walked along token by token, a token's heads side by side; and the stride of tokens."""
    rows, _, tokens, size = x.shape
    of_row, of_head, of_token, of_number = x.stride()
    if of_number == 1 and of_head == size and (rows == 1 or of_row == tokens * of_token):
        return x, of_token
    return x.transpose(1, 2).contiguous(), x.shape[1] * size


class Small:
    """The small products of layers that are given one input: of each A (r, i) and B (o, r), float32, in turn."""

    def __init__(self, trained: Sequence[Tensor], scale: float) -> None:
        self.trained = trained
        a, b = trained[::2], trained[1::2]
        ranks, heights = [len(part) for part in a], [len(part) for part in b]
        self.rank = sum(-(-rank // LANES) * LANES for rank in ranks)
        lists = (_places(a), _places(b), (c_int64 * len(ranks))(*ranks), (c_int64 * len(ranks))(*heights))
        self.lists = lists  # the structure points into them
        shape = (len(ranks), a[0].shape[1], sum(heights), self.rank)
        self.about = _Lora(*shape, *map(ctypes.addressof, lists), scale)

    @staticmethod
    def serves(rows: Tensor, trained: Sequence[Tensor]) -> bool:
        """Whether these can be multiplied here."""
        like = all(part.dtype == torch.float32 and part.is_contiguous() for part in trained)
        return like and serve(rows) and not any(len(part) % LANES for part in trained[1::2])

    def down(self, x: Tensor) -> Tensor:
        """x (n, i) -> scale * A x, (n, R); ranks are filled up to whole vectors."""
        x, low = x.contiguous(), torch.empty(len(x), self.rank, dtype=x.dtype)
        call("lora_down", self.about, x, low, len(x))
        return low

    def stacked(self) -> Tensor:
        """scale * A of all layers, (R, i)."""
        return torch.cat([pad(self.about.scale * a, (0, 0, 0, -len(a) % LANES)) for a in self.trained[::2]])

    def packed(self) -> Tensor:
        """B of all layers as `up` takes it."""
        to = torch.empty(self.rank * self.about.outputs, dtype=torch.bfloat16)
        call("lora_pack", self.about, to)
        return to

    def up(self, packed: Tensor, low: Tensor, out: Tensor) -> Tensor:
        """out (n, O), to which B low is added in place."""
        call("lora_up", self.about, packed, low, low.stride(0), out, out.stride(0), len(out))
        return out

    def backward(self, above: Tensor, x: Tensor, low: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient of the outputs, `above` (n, O): that of A x times scale, (n, R), and those of `trained`."""
        above, x, up = above.contiguous(), x.contiguous(), torch.empty_like(low)
        gradients = [torch.empty_like(part) for part in self.trained]
        lists = _places(gradients[::2]), _places(gradients[1::2])
        call("lora_backward", self.about, above, x, low, up, *lists, len(x))
        return up, gradients

    def onwards(self, up: Tensor, below: Tensor) -> Tensor:
        """below (n, i), the gradient of x, to which A's part is added in place."""
        call("lora_onwards", self.about, up, below, len(below))
        return below


def _places(parts: Sequence[Tensor]) -> ctypes.Array:
    return (c_void_p * len(parts))(*(part.data_ptr() for part in parts))
