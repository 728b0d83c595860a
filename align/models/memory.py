"""Memory as budgets: bytes that a device still has, bytes of a token, and how much is held at once because of both."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

CACHE_SHARE, LOGITS_SHARE = 1 / 2, 1 / 32  # of the free bytes, at most
MOST_CACHED = {"cpu": 2**15, "cuda": 2**20}  # tokens; on a CPU more rows at once take no less time
MOST_PROMPTS = 2**14  # tokens of one pass over prompts: they keep the device busy
MOST_LOGITS = {"cpu": 48 * 2**20, "cuda": 2**29}  # bytes: rows enough for an efficient product
CGROUP = Path("/sys/fs/cgroup")


class Budgets(NamedTuple):
    """How much is held at once. It changes speed and memory, and results only in rounding."""

    cache_tokens: int  # of prompts and responses whose keys and values are kept while it samples
    prompt_tokens: int  # in one pass over prompts
    logits_bytes: int  # of float32 logits

    def asked(self, cache_tokens: int | str) -> Budgets:
        """The same, with a recipe's `batch.cache_tokens`."""
        if cache_tokens == "auto":
            return self
        return self._replace(cache_tokens=int(cache_tokens), prompt_tokens=min(int(cache_tokens), MOST_PROMPTS))


def budgets(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, free: int, later: int = 0) -> Budgets:
    """Budgets of a model that has been loaded onto `device`, where `free` bytes are then left. `later`: bytes that come
    while it samples, such as the weights that other processes hold.

    Powers of two: a resumed run finds a little more or less memory, and should work in the same portions.
    """
    cached = int(max(free - later, 0) * CACHE_SHARE) // cached_token_bytes(config, dtype)
    cached = min(_power_below(cached), _most(MOST_CACHED, device))
    logits = min(_power_below(int(free * LOGITS_SHARE)), _most(MOST_LOGITS, device))
    return Budgets(cached, min(cached, MOST_PROMPTS), logits)


def cached_token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers; those of other states than keys and values do not count."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key, value = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
    return config.num_hidden_layers * groups * (key + value) * dtype.itemsize


def elsewhere_bytes(module: nn.Module) -> int:
    """Bytes of weights that other processes hold, where they are sharded."""
    shards = [p for p in module.parameters() if isinstance(p, DTensor)]
    return sum((p.numel() - p.to_local().numel()) * p.element_size() for p in shards)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take on the device: on a GPU with what its allocator holds and does not use,
    on a CPU its share of what is available, within the limit of a container."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min(psutil.virtual_memory().available, _container_bytes()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_bytes() -> int:
    """What is left of a cgroup's limit, with the pages of files that it can drop; a very large number without one."""
    with suppress(OSError, ValueError):  # version 2; no such file, or the word max
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(pages.get("inactive_file", 0)))
    return 2**62


def _most(limits: dict[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cuda"])


def _power_below(number: int) -> int:
    return 2 ** max(0, number.bit_length() - 1)
