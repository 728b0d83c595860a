"""Kernels of our own, `kernels/*.c`, for what lies between the large products on a CPU in bfloat16.

PyTorch takes some ten passes over memory for a norm or a gated MLP, and many small products for attention over short
segments; each of these takes one pass. They are compiled once, by the machine's C compiler, and kept in the user's
cache. Where there is none, and for other dtypes and devices, PyTorch does the work: the numbers differ in rounding alone.

Shapes: n rows, d numbers a row; H query heads, G key/value heads, T tokens, D head size.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.models.blocks import QUERY_BLOCK, ForestMask
from align.models.demo import cache_folder

SOURCES = sorted(Path(__file__).with_name("kernels").iterdir())
FLAGS = (
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    f"-DQUERIES={QUERY_BLOCK}",
)
LANES, WIDEST_HEAD = 16, 256


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((name, c_int64) for name in ("query_row", "key_row", "value_row")),
        *((name, c_void_p) for name in ("blocks", "spans")),
        *((name, c_int64) for name in ("heads", "groups", "size")),
        ("scale", c_float),
        ("threads", c_int),
    ]


class _Lora(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "inputs", "outputs", "rank")),
        *((name, c_void_p) for name in ("a", "b", "ranks", "heights")),
        ("scale", c_float),
        ("threads", c_int),
    ]


P, I = c_void_p, c_int64
SIGNATURES = {
    "norm_forward": [P, P, P, P, I, I, c_float, c_int],
    "norm_backward": [P, P, P, P, P, I, I, c_int],
    "gated_forward": [P, I, P, I, I, c_int],
    "gated_backward": [P, P, P, I, I, c_int],
    "rotate": [P, I, P, P, P, I, I, I, c_float, c_int],
    "lora_down": [ctypes.POINTER(_Lora), P, P, I],
    "lora_pack": [ctypes.POINTER(_Lora), P],
    "lora_up": [ctypes.POINTER(_Lora), P, P, I, P, I, I],
    "lora_backward": [ctypes.POINTER(_Lora), *[P] * 6, I],
    "lora_onwards": [ctypes.POINTER(_Lora), P, P, I],
    "attention_forward": [ctypes.POINTER(_Attention), I, P, P],
    "attention_backward": [ctypes.POINTER(_Attention), P, I, I, *[P] * 8],
}


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels take these: bfloat16 on a CPU, in whole vectors."""
    return all(
        part.dtype == torch.bfloat16 and part.device.type == "cpu" and part.shape[-1] % LANES == 0 for part in tensors
    ) and bool(tensors[0].numel() and library())


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be made."""
    try:
        return _load(_compiled())
    except (OSError, subprocess.CalledProcessError):
        return None


def _compiled() -> Path:
    """The shared library for this machine, made if it is not there yet."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    described = [*(path.read_text("utf-8") for path in SOURCES), *FLAGS, compiler, _processor()]
    folder = cache_folder() / "kernels"
    made = folder / f"{hashlib.sha256(repr(described).encode()).hexdigest()[:16]}.so"
    if not made.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as work:
            files = [str(path) for path in SOURCES if path.suffix == ".c"]
            subprocess.run([compiler, "-c", *FLAGS, *files], check=True, capture_output=True, cwd=work)
            parts, whole = [path.name for path in Path(work).glob("*.o")], Path(work) / made.name
            link = [compiler, "-shared", *parts, "-lm", "-o", made.name]  # not with an OpenMP of the compiler's
            subprocess.run(link, check=True, capture_output=True, cwd=work)
            whole.replace(made)
    return made


def _processor() -> str:
    """What the compiler's `native` depends on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else [platform.processor()]
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags"))))


def _load(path: Path) -> ctypes.CDLL:
    """The library on PyTorch's own OpenMP: with a second one, both would wait for cores that the other holds."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if Path(line.split()[-1]).name.startswith(("libgomp", "libiomp5"))}
    for runtime in runtimes:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (…, d) -> w * x / rms(x) and 1 / rms(x), (…, 1) float32."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    scale = torch.empty(*x.shape[:-1], 1)
    _call("norm_forward", x, weight, out, scale, scale.numel(), x.shape[-1], eps)
    return out, scale


def norm_backward(above: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x, (…, d)."""
    above, x, out = above.contiguous(), x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    _call("norm_backward", above, x, weight, scale, out, scale.numel(), x.shape[-1])
    return out


def gated(both: Tensor) -> Tensor:
    """Gate and up side by side, (n, 2 d) -> silu(gate) * up, (n, d)."""
    n, d = both.shape[0], both.shape[1] // 2
    out = torch.empty(n, d, dtype=both.dtype)
    _call("gated_forward", both, both.stride(0), out, n, d)
    return out


def gated_backward(both: Tensor, above: Tensor) -> Tensor:
    """The gradient of `both`, (n, 2 d), from that of silu(gate) * up, `above` (n, d)."""
    below = torch.empty_like(both)
    _call("gated_backward", both, above, below, *above.shape)
    return below


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x (R, H, T, D), cos and sin (R, T, D) -> x turned, or turned back."""
    rows, heads, tokens, size = x.shape
    lines, stride = _by_token(x)
    out = torch.empty(rows, tokens, heads, size, dtype=x.dtype)
    about = (out, rows * tokens, heads, size, -1.0 if back else 1.0)
    _call("rotate", lines, stride, cos.contiguous(), sin.contiguous(), *about)
    return out.transpose(1, 2)


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
        self.about = _Lora(*shape, *map(ctypes.addressof, lists), scale, torch.get_num_threads())

    @staticmethod
    def serves(rows: Tensor, trained: Sequence[Tensor]) -> bool:
        """Whether these can be multiplied here."""
        like = all(part.dtype == torch.float32 and part.is_contiguous() for part in trained)
        return like and serve(rows) and not any(len(part) % LANES for part in trained[1::2])

    def down(self, x: Tensor) -> Tensor:
        """x (n, i) -> scale * A x, (n, R); ranks are filled up to whole vectors."""
        low = torch.empty(len(x), self.rank, dtype=x.dtype)
        library().lora_down(self.about, x.data_ptr(), low.data_ptr(), len(x))
        return low

    def stacked(self) -> Tensor:
        """scale * A of all layers, (R, i)."""
        return torch.cat([pad(self.about.scale * a, (0, 0, 0, -len(a) % LANES)) for a in self.trained[::2]])

    def packed(self) -> Tensor:
        """B of all layers as `up` takes it."""
        to = torch.empty(self.rank * self.about.outputs, dtype=torch.bfloat16)
        library().lora_pack(self.about, to.data_ptr())
        return to

    def up(self, packed: Tensor, low: Tensor, out: Tensor) -> Tensor:
        """out (n, O), to which B low is added in place."""
        places = (low.data_ptr(), low.stride(0), out.data_ptr(), out.stride(0))
        library().lora_up(self.about, packed.data_ptr(), *places, len(out))
        return out

    def backward(self, above: Tensor, x: Tensor, low: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient of the outputs, `above` (n, O): that of A x times scale, (n, R), and those of `trained`."""
        up, gradients = torch.empty_like(low), [torch.empty_like(part) for part in self.trained]
        lists = _places(gradients[::2]), _places(gradients[1::2])
        places = [part.data_ptr() for part in (above, x, low, up)]
        library().lora_backward(self.about, *places, *lists, len(x))
        return up, gradients

    def onwards(self, up: Tensor, below: Tensor) -> Tensor:
        """below (n, i), the gradient of x, to which A's part is added in place."""
        library().lora_onwards(self.about, up.data_ptr(), below.data_ptr(), len(below))
        return below


def _places(parts: Sequence[Tensor]) -> ctypes.Array:
    return (c_void_p * len(parts))(*(part.data_ptr() for part in parts))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float) -> tuple[Tensor, Tensor]:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), and what `attention_backward` needs, (T, H)
    float32."""
    _, heads, tokens, size = query.shape
    out, logsum = torch.empty(1, tokens, heads, size, dtype=query.dtype), torch.empty(tokens, heads)
    about, _kept = _attention(query, key, value, mask, scale)
    library().attention_forward(about, len(mask.walks.blocks), out.data_ptr(), logsum.data_ptr())
    return out, logsum


def attention_backward(
    above: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ForestMask,
    scale: float,
    out: Tensor,
    logsum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value from that of `out`, `above` (1, T, H, D)."""
    _, heads, tokens, size = query.shape
    above, trees = above.contiguous(), mask.walks.trees
    of_keys, of_values = torch.empty(2, tokens, heads, size)
    grads = [torch.empty(1, tokens, part.shape[1], size, dtype=part.dtype) for part in (query, key, value)]
    about, _kept = _attention(query, key, value, mask, scale)
    places = [part.data_ptr() for part in (out, logsum, above, of_keys, of_values, *grads)]
    library().attention_backward(about, trees.data_ptr(), len(trees) - 1, tokens, *places)
    return tuple(grad.transpose(1, 2) for grad in grads)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: ForestMask, scale: float
) -> tuple[_Attention, list[Tensor]]:
    """What both directions take, and the tensors that it points into."""
    lines, strides = zip(*map(_by_token, (query, key, value)), strict=True)
    kept = [*lines, mask.walks.blocks, mask.walks.spans]
    places, (blocks, spans) = [part.data_ptr() for part in lines], [part.data_ptr() for part in kept[3:]]
    shape = (query.shape[1], key.shape[1], query.shape[-1])
    return _Attention(*places, *strides, blocks, spans, *shape, scale, torch.get_num_threads()), kept


def _by_token(x: Tensor) -> tuple[Tensor, int]:
    """(R, H, T, D) as it can be walked along token by token, a token's heads side by side; and the stride of tokens."""
    rows, _, tokens, size = x.shape
    of_row, of_head, of_token, of_number = x.stride()
    if of_number == 1 and of_head == size and (rows == 1 or of_row == tokens * of_token):
        return x, of_token
    return x.transpose(1, 2).contiguous(), x.shape[1] * size


def _call(name: str, *arguments: Tensor | float) -> None:
    places = (part.data_ptr() if isinstance(part, Tensor) else part for part in arguments)
    getattr(library(), name)(*places, torch.get_num_threads())
