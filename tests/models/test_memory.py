"""Budgets that follow the memory there is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models.tiny import ATTENTION, SPECIAL, VOCABULARY, tiny_model, tiny_trunk
from transformers import LlamaConfig

from align.models import memory
from align.models.memory import Budgets, budgets, cached_token_bytes, free_bytes
from align.models.sampling import rows
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.recipe.schema import Lora

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA_8B = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)
LLAMA_7B = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in (7, 3, 12, 1)]


def test_bytes_of_a_cached_token_by_hand():
    """32 layers, keys and values, 8 or 32 heads of 128 numbers of 2 bytes."""
    assert cached_token_bytes(LLAMA_8B, torch.bfloat16) == 131_072
    assert cached_token_bytes(LLAMA_7B, torch.bfloat16) == 524_288


@pytest.mark.parametrize("family", ATTENTION)
def test_bytes_of_a_cached_token_are_those_of_the_cache(family, monkeypatch):
    trunk, found = tiny_trunk(family, Lora(r=4)), []
    made = rows.KeyValues

    def watched(*args):
        found.append(made(*args))
        return found[-1]

    monkeypatch.setattr(rows, "KeyValues", watched)
    sample(trunk, PROMPTS, Sampling(1), [(i,) for i in range(4)])
    (kept,) = found
    size = sum(part.nbytes for layer in kept.layers.values() for part in layer)
    assert size == cached_token_bytes(trunk.plain.config, torch.float32) * len(PROMPTS) * kept.room


def test_a_cache_takes_half_of_the_free_memory_at_most():
    """An 8B in bfloat16 leaves 123 GB of an H200 and 8 GB of a 24 GB card."""
    for gigabytes, tokens in ((123, 262_144), (8, 16_384)):
        found = budgets(LLAMA_8B, torch.bfloat16, CUDA, gigabytes * 10**9)
        assert found.cache_tokens == tokens
        assert found.cache_tokens * 131_072 <= gigabytes * 10**9 / 2 < 2 * found.cache_tokens * 131_072
    assert budgets(LLAMA_7B, torch.bfloat16, CUDA, 8 * 10**9) == Budgets(4096, 4096, 2**27)
    assert budgets(LLAMA_8B, torch.bfloat16, CUDA, 0).cache_tokens == 1


def test_what_other_processes_hold_of_a_trunk_has_room_too():
    """It is whole while it samples. A chunk of logits is cut in training as well, where it is not."""
    whole, shared = (budgets(LLAMA_8B, torch.bfloat16, CUDA, 60 * 10**9, other * 10**9) for other in (0, 30))
    assert shared.cache_tokens == budgets(LLAMA_8B, torch.bfloat16, CUDA, 30 * 10**9).cache_tokens < whole.cache_tokens
    assert shared.logits_bytes == whole.logits_bytes
    assert budgets(LLAMA_8B, torch.bfloat16, CUDA, 10**9, 10**10).cache_tokens == 1


def test_with_memory_enough_budgets_are_what_keeps_a_device_busy():
    small = tiny_model("llama").config
    assert budgets(small, torch.float32, CUDA, 10**12) == Budgets(1_048_576, 16_384, 2**29)
    assert budgets(small, torch.float32, CPU, 10**12) == Budgets(32_768, 16_384, 48 * 2**20)


def test_a_recipe_may_ask_for_less():
    found = Budgets(32_768, 16_384, 1)
    assert found.asked("auto") == found
    assert found.asked(2048) == Budgets(2048, 2048, 1)
    assert found.asked(65_536) == Budgets(65_536, 16_384, 1)


def test_free_bytes_are_within_the_limit_of_a_container_and_shared_by_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    alone = free_bytes(CPU)
    assert 0 < alone < 2**50
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 50000\n")
    assert free_bytes(CPU) == 650_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(CPU) == 325_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == pytest.approx(alone / 2, rel=0.3)


def test_free_bytes_of_a_gpu_count_what_the_allocator_holds_unused(monkeypatch):
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            memory_reserved=lambda _: 70, memory_allocated=lambda _: 50, mem_get_info=lambda _: (1000, 2000)
        ),
    )
    assert free_bytes(CUDA) == 1020
