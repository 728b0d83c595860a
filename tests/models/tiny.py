"""Checkpoints of a few ten thousand parameters, one for every family that the tests speak of."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from align.data.trees import Tree
from align.models.base import Base
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

torch.set_num_threads(1)  # on products this small, threads only wait for each other

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(SPECIAL)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that every token that a query sees moves its logits
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
WINDOW = 5  # shorter than the trees of the tests
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | NO_DROPOUT,
    "mistral-window": {"model_type": "mistral", "sliding_window": WINDOW},
    "gemma": {"model_type": "gemma"},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {"model_type": "granite", "logits_scaling": 3.0},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
    "mamba": {"model_type": "mamba", "state_size": 8, "conv_kernel": 4, "time_step_rank": 4},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
}
ATTENTION = [name for name in FAMILIES if name not in ("mamba", "lfm2")]
RECURRENT = ["mamba", "lfm2"]
APART = ("llama", "gpt2", "mistral-window", "gemma2", "gemma3")  # their attention or their cache differs
FEW = [name if name in APART else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTION]


def tiny_model(family: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A float32 model of `family` with seeded random weights, biases and norms included."""
    settings = SIZES | FAMILIES[family] | more
    if settings["model_type"] in ("gpt2", "mamba"):  # they spell their sizes their own way
        settings = {k: v for k, v in settings.items() if k not in ("num_attention_heads", "num_key_value_heads")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float()
        for p in model.parameters():
            if p.ndim == 1:
                p.data += 0.1 * torch.randn_like(p)
    return model


@lru_cache
def _bytes() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; pad and eos are the same token."""
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bytes()), **tokens)


def save_base(folder: Path, family: str = "llama", *, model: PreTrainedModel | None = None) -> Path:
    """A checkpoint folder in Hugging Face format."""
    (tiny_model(family) if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """The same of a BERT of a few thousand weights."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_base(folder, model=BertForMaskedLM(config))


def tiny_trunk(family: str, lora: Lora | None, layout: str = "auto", *, model: PreTrainedModel | None = None) -> Trunk:
    """A float32 trunk whose adapters already say something (B is not 0)."""
    model = tiny_model(family) if model is None else model
    base = Base(model, tiny_tokenizer(), "fingerprint", f"tiny/{family}", f"tiny/{family}")
    trunk = Trunk(base, Model(base=base.name, dtype="float32", layout=layout), lora)
    return stir(trunk)


def stir(trunk: Trunk, seed: int = 1) -> Trunk:
    """Give every adapter's B seeded values, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=draw)
    return trunk


def tree(*lengths: int, seed: int = 0, share: float = 0.7) -> Tree:
    """Random tokens: a stem of the first length, branches of the others; about `share` of them trained."""
    draw = np.random.default_rng(seed)
    segments = tuple(draw.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths)
    trained = tuple(draw.random(length) < share for length in lengths)
    for marks in trained:
        marks[-1] = True
    return Tree(segments, trained)


def gradients(trunk: torch.nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the log-probabilities: every label pulls differently."""
    trained = {name: p for name, p in trunk.named_parameters() if p.requires_grad}
    weights = torch.linspace(0.5, 1.5, len(logprobs))
    found = torch.autograd.grad((logprobs * weights).sum(), list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}
