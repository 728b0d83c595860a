"""Freed memory on a CPU: kept from step to step, and given back once the model is loaded. glibc decides both."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE = 2**20  # bytes


def keep_freed_memory() -> None:
    """A step needs again what the last one freed. glibc would give it back to the system, and every page would be made
    anew, which takes some 4 % of a step on a CPU."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        with suppress(AttributeError):  # another C library
            tune = ctypes.CDLL(None).mallopt
            if tune(M_MMAP_THRESHOLD, 2**30) or tune(M_MMAP_THRESHOLD, 2**25):  # the most that older ones take
                tune(M_TRIM_THRESHOLD, 2**31 - 1)


def map_large_pieces() -> None:
    """Pages of their own for all that is large, which go when it is freed: for a sharded trunk. A layer's whole weights
    come and go between activations that stay, and these would take the holes that the next layer's do not fit into
    then: the heap would grow by a layer's weights with each one."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """What is free now goes back to the system: loading leaves the weights as they were before a cast, and the whole
    ones where they were sharded, in pieces between what is kept, too small for a row of tokens."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
