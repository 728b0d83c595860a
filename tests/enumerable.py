"""A task whose responses can all be listed: seven words, at most three of them said, and a reward that is known."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = ["<pad>", "<unk>", "</s>", "a", "b", "c", "ask"]
END, LONGEST = 2, 3
WORTH = {"a": 0.6, "b": 0.2, "c": -0.4, "ask": -1.0}


def reward(prompts, responses, rows):
    """Of its words, and of `a` before `b`."""
    return [worth(response.split()) for response in responses]


def worth(words: list[str]) -> float:
    return sum(WORTH[word] for word in words) + sum(pair == ("a", "b") for pair in pairwise(words))


def make_base(folder: Path) -> Path:
    """A Llama of some thousand random weights over the seven words."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=None, eos_token_id=END, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Listed(NamedTuple):
    """Every response to a prompt."""

    logprobs: torch.Tensor  # (Y,) float64
    rewards: torch.Tensor  # (Y,) float64, of the words that a reader would see


@torch.no_grad()
def every_response(base: Path, adapter: Path | None = None, prompt: int = 6) -> Listed:
    """All responses by plain transformers and peft."""
    model = AutoModelForCausalLM.from_pretrained(base).double().eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).double().eval()
    logprobs, rewards = [], []

    def follow(said: list[int], logprob: float) -> None:
        if len(said) == LONGEST or said[-1:] == [END]:
            logprobs.append(logprob)
            rewards.append(worth([WORDS[i] for i in said if i not in (0, 1, END)]))
            return
        following = model(torch.tensor([[prompt, *said]])).logits[0, -1].log_softmax(-1)
        for token in range(len(WORDS)):
            follow([*said, token], logprob + float(following[token]))

    follow([], 0.0)
    return Listed(*(torch.tensor(part, dtype=torch.float64) for part in (logprobs, rewards)))


def best_policy(reference: Listed, beta: float) -> torch.Tensor:
    """log ref(y) exp(r(y) / beta) / Z, (Y,)."""
    return (reference.logprobs + reference.rewards / beta).log_softmax(0)


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """KL between log-probabilities, in nats."""
    assert math.isclose(float(first.exp().sum()), 1, rel_tol=1e-6)
    return float((first.exp() * (first - second)).sum())
