"""Models of a given shape with random weights, and random examples for them: the speed and memory of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from align.data.trees import Tree
from align.models.base import Base
from align.models.memory import free_bytes
from align.models.scoring import with_head
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

LORA = Lora(r=16, alpha=32)
END = 2  # LlamaConfig's end of text
LONGEST = 2048  # tokens of a conversation at most
FILL = 0.7  # of the free memory that a row's activations may take


class Shape(NamedTuple):
    """A model's size, and the tokens of one row."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    row_tokens: int  # at most

    def fitting(self, device: torch.device, roles: int = 1) -> int:
        """Tokens of a row whose activations fit beside what is loaded, for roles that train: of each layer and token
        some eight states and three of the MLP's width in bfloat16. A power of two."""
        token = 2 * roles * self.layers * (8 * self.hidden + 3 * self.mlp)
        room = int(FILL * free_bytes(device)) // token
        return min(self.row_tokens, 2 ** max(8, room.bit_length() - 1))


class Drawn:
    """Random trees as the examples of a run."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = trees
        self.lengths = np.array([sum(map(len, tree.segments)) for tree in trees])
        self.longest = np.array([max(len(tokens) for tokens, _ in tree.paths()) for tree in trees])
        self.paths = np.array([tree.path_count for tree in trees])
        self.room = self.lengths + self.paths - 1

    def __len__(self) -> int:
        return len(self.trees)

    def tree(self, i: int) -> Tree:
        """Example `i`."""
        return self.trees[i]

    def order(self, _seed: int, _epoch: int) -> np.ndarray:
        """(n,) int64, as they were drawn."""
        return np.arange(len(self))


def random_model(shape: Shape, device: torch.device) -> nn.Module:
    """A Llama of this shape in bfloat16."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.hidden < 2048,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def random_trunk(shape: Shape, device: torch.device, checkpointing: bool = False, outputs: int | None = None) -> Trunk:
    """The same under a LoRA; with `outputs`, under a head of so many scores in place of the output projection."""
    model = random_model(shape, device)
    return adapted(with_head(model, outputs, 0).to(device) if outputs else model, shape, checkpointing, outputs)


def adapted(model: nn.Module, shape: Shape, checkpointing: bool = False, outputs: int | None = None) -> Trunk:
    """A model as a trunk; it has no tokenizer but an end of text."""
    base = Base(model, SimpleNamespace(eos_token_id=END, chat_template=None), "random", shape.name, shape.name)
    section = Model(base=shape.name, gradient_checkpointing=checkpointing)
    trunk = Trunk(base, section, LORA, outputs=outputs).train()
    if not trunk.packed:
        print(f"{shape.name}: padded layout, for {trunk.layout_reason}", flush=True)
    return trunk


def whole(shape: Shape, count: int, length: int) -> Drawn:
    """Texts of one length, all of it learnt."""
    draw = np.random.default_rng(3)
    return Drawn([Tree((words(draw, shape, length),), (np.ones(length, bool),)) for _ in range(count)])


def conversations(shape: Shape, count: int) -> Drawn:
    """Conversations with the lengths of a chat set, a quarter of each the prompt."""
    draw = np.random.default_rng(0)
    lengths = log_normal(draw, 400, count, 16, min(LONGEST, shape.row_tokens // 2))
    return Drawn([Tree((words(draw, shape, n),), (np.arange(n) >= n // 4,)) for n in lengths])


def pairs(shape: Shape, count: int) -> Drawn:
    """Two answers each to a prompt, all as ragged as those of a preference set; the marks are the answers'."""
    draw, most = np.random.default_rng(1), shape.row_tokens // 8
    lengths = np.stack([log_normal(draw, mean, count, 8, most) for mean in (200, 150, 150)], 1)  # (count, 3)
    return Drawn(
        [
            Tree(tuple(words(draw, shape, n) for n in own), tuple(np.full(n, i > 0) for i, n in enumerate(own)))
            for own in lengths
        ]
    )


def prompts(shape: Shape, count: int, shortest: int = 16, longest: int = 192) -> Drawn:
    """Prompts of all lengths in between."""
    draw = np.random.default_rng(2)
    lengths = draw.integers(shortest, longest + 1, count)
    return Drawn([Tree((words(draw, shape, n),), (np.zeros(n, bool),)) for n in lengths])


def log_normal(draw: np.random.Generator, median: int, count: int, least: int, most: int) -> np.ndarray:
    """Lengths, (count,) int64."""
    return np.clip(draw.lognormal(np.log(median), 0.7, count), least, most).astype(int)


def words(draw: np.random.Generator, shape: Shape, length: int) -> np.ndarray:
    """Random token ids, (length,) int32, none of them special."""
    return draw.integers(END + 1, shape.vocabulary, length).astype(np.int32)
