"""The C kernels of `kernels/`, compiled once by the machine's C compiler and kept in the user's cache.

They are for bfloat16 on CPUs that multiply it (AVX512-BF16). Where there is no compiler, and for other dtypes and
devices, PyTorch does their work: the numbers differ in rounding alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from align.models.cpu.blocks import QUERY_BLOCK
from align.models.demo import cache_folder

SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing")
COMPILERS = ("cc", "gcc", "clang")
RUNTIMES = ("libgomp", "libiomp5", "libomp")  # of OpenMP
LANES, WIDEST_HEAD = 16, 256  # numbers in a vector; of a head at most


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels take these: bfloat16 on a CPU, rows in whole vectors."""
    return all(_fits(part) for part in tensors) and library() is not None


def _fits(part: Tensor) -> bool:
    of_cpu = part.dtype == torch.bfloat16 and part.device.type == "cpu"
    return of_cpu and part.shape[-1] % LANES == 0 and part.numel() > 0


def call(name: str, *arguments: Tensor | ctypes.Structure | ctypes.Array | float) -> None:
    """A kernel with pointers to these, and with as many threads as PyTorch takes."""
    getattr(library(), name)(*map(_passed, arguments), ctypes.c_int64(torch.get_num_threads()))


def _passed(argument: Tensor | ctypes.Structure | ctypes.Array | float) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument  # an array is a pointer already


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be made."""
    if not suits():
        return None
    for compiler in filter(None, [os.environ.get("CC"), *map(shutil.which, COMPILERS)]):
        with suppress(OSError, ValueError, RuntimeError, subprocess.CalledProcessError):
            return _load(_compiled(compiler))
    return None


@cache
def suits() -> bool:
    """Whether this processor is one that the kernels are for."""
    return torch.cpu._is_avx512_bf16_supported()


def _compiled(compiler: str) -> Path:
    """The shared library for this machine, made if it is not there yet (some 2 s)."""
    flags = (*FLAGS, f"-DQUERIES={QUERY_BLOCK}", f"-DWIDEST={WIDEST_HEAD}")
    described = [*(path.read_text("utf-8") for path in SOURCES), *flags, compiler, _processor()]
    folder = cache_folder() / "kernels"
    made = folder / f"{hashlib.sha256(repr(described).encode()).hexdigest()[:16]}.so"
    if not made.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as work:
            files = [str(path) for path in SOURCES if path.suffix == ".c"]
            objects = [f"{path.stem}.o" for path in SOURCES if path.suffix == ".c"]
            link = ["-shared", *objects, "-lm", "-o", made.name]  # with no OpenMP of its own
            for words in (["-c", *flags, *files], link):
                subprocess.run([*shlex.split(compiler), *words], check=True, capture_output=True, cwd=work)
            (Path(work) / made.name).replace(made)
    return made


def _processor() -> str:
    """What the compiler's `native` depends on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="replace").splitlines() if about.is_file() else [platform.processor()]
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags"))))


def _load(path: Path) -> ctypes.CDLL:
    """The library on PyTorch's own OpenMP: with a second one, both would wait for cores that the other holds."""
    maps = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    files = {line.split(maxsplit=5)[-1] for line in maps}
    for runtime in sorted(file for file in files if Path(file).name.startswith(RUNTIMES)):
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))
