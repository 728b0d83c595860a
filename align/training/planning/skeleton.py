"""A recipe's model without weights, on the meta device: how many numbers it has, and of which kind.

Models of one and of two layers are made, and what the second adds is multiplied. So a model of 70 billion weights takes
no longer than a small one, and no list of architectures has to be kept.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.models.acceleration import offer
from align.models.base import base_config, empty_model
from align.models.checkpoints.sources import config_folder
from align.models.lora import lora_config
from align.models.scoring import is_encoder
from align.recipe.schema import Lora, Model


class Sizes(NamedTuple):
    """Counts of numbers."""

    matrices: int  # weights of linear layers below the head, which quantisation packs
    tables: int  # embeddings, and the output head unless it is tied or not there
    vectors: int  # norms, biases
    layer: int  # all of one layer
    largest: int  # the largest single tensor
    matrix: int  # the largest of the matrices
    multiplied: int  # N: weights that a token is multiplied with, a tied head included
    adapter: int  # what one LoRA has; 0 without
    depth: int
    width: int  # d
    vocabulary: int
    heads: int
    groups: int  # key/value heads
    head: int  # numbers of one head

    @property
    def weights(self) -> int:
        """Of the trunk."""
        return self.matrices + self.tables + self.vectors

    @property
    def cached(self) -> int:
        """Numbers of one token's keys and values in all layers."""
        return 2 * self.depth * self.groups * self.head


class Skeleton:
    """The model of a recipe, as its config describes it."""

    def __init__(self, model: Model, lora: Lora | None, outputs: int | None = None) -> None:
        """`outputs`: scores of a head in place of the output projection. Raises UserError for a base that cannot be
        had; of one that is not on this machine only the config is fetched."""
        self.model, self.lora, self.outputs = model, lora, outputs
        self.folder = config_folder(model)
        self.config = base_config(model, outputs is not None, self.folder)
        self.encoder = is_encoder(self.config)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Two skeletons with the same are alike."""
        written = json.dumps(self.config.to_dict(), sort_keys=True, default=str)
        settings = (self.model.quantize, self.model.gradient_checkpointing)
        return written, self.lora and self.lora.model_dump_json(), self.outputs, settings

    @property
    def text(self) -> PreTrainedConfig:
        """The decoder's part of the config."""
        return self.config.get_text_config()

    @property
    def stored(self) -> torch.dtype:
        """What the checkpoint's file holds, as its config says."""
        return self.text.dtype or self.config.dtype or torch.float32

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def sizes(self) -> Sizes:
        """Counted on models of one and two layers."""
        return _sizes(self)

    def _sizes(self) -> Sizes:
        one, two = (_counted(self.made(depth), bool(self.outputs)) for depth in (1, 2))
        depth, text = self.text.num_hidden_layers, self.text
        count = {name: first + (depth - 1) * (two[name] - first) for name, first in one.items()}
        heads = getattr(text, "num_attention_heads", 1)
        return Sizes(
            **count | {name: two[name] for name in ("largest", "matrix")},
            layer=sum(two[name] - one[name] for name in ("matrices", "tables", "vectors")),
            depth=depth,
            width=text.hidden_size,
            vocabulary=text.vocab_size,
            heads=heads,
            groups=getattr(text, "num_key_value_heads", None) or heads,
            head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )

    def made(self, depth: int, dtype: torch.dtype = torch.float32, device: str = "meta") -> nn.Module:
        """The model with so many layers: its adapter in float32, the rest in `dtype`."""
        config = deepcopy(self.config)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.num_hidden_layers, part.pad_token_id = depth, None  # whether a token is padding, a trace cannot tell
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[:depth]
        if self.encoder:
            config.num_labels = self.outputs or 1
        with torch.device(device):
            kind = AutoModelForSequenceClassification if self.encoder else AutoModelForCausalLM
            made = empty_model(self.model, config, kind)
        for p in made.parameters():
            p.data = p.data.to(dtype)
        if self.lora is not None:
            made.requires_grad_(False)
            made = get_peft_model(made, lora_config(self.lora, made))
        if self.model.quantize:
            for layer in [m for m in made.modules() if type(m) is lora.Linear]:
                layer.__class__ = _Packed
        return made


class _Packed(lora.Linear):
    """An adapter on a quantised layer: peft's own forward, which nothing faster replaces."""


@lru_cache(maxsize=16)
def _sizes(skeleton: Skeleton) -> Sizes:
    return skeleton._sizes()


@lru_cache(maxsize=16)
def joined(skeleton: Skeleton, device: str) -> int:
    """Numbers of weights that stand in a tensor of their own on this device, for one product instead of several."""
    one, two = (_joined(skeleton.made(depth), device) for depth in (1, 2))
    return one + (skeleton.text.num_hidden_layers - 1) * (two - one)


def _joined(model: nn.Module, device: str) -> int:
    offer(torch.device(device)).adopt(plain(model), True)
    groups = {id(m.group): m.group for m in model.modules() if getattr(m, "group", None) is not None}
    return sum(t.numel() for group in groups.values() for t in vars(group).values() if isinstance(t, Tensor))


def plain(model: nn.Module) -> PreTrainedModel:
    """transformers' model, without what peft has put around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _counted(model: nn.Module, scores: bool) -> dict[str, int]:
    """Numbers by kind; `scores`: the output projection is left out."""
    base = plain(model)
    named = {id(p): (name, p) for name, p in model.named_parameters()}
    adapter = sum(p.numel() for name, p in named.values() if "lora_" in name)
    own = {key: p for key, (name, p) in named.items() if "lora_" not in name}
    matrices = {id(m.weight) for m in base.modules() if isinstance(m, nn.Linear | Conv1D)} & own.keys()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if head is not None:
        matrices.discard(id(head.weight))
        if scores and not tied:
            del own[id(head.weight)]
    sums = {"matrices": 0, "tables": 0, "vectors": 0, "largest": max(p.numel() for p in own.values())}
    sums["matrix"] = max((own[key].numel() for key in matrices), default=0)
    for key, p in own.items():
        sums["vectors" if p.ndim < 2 else "matrices" if key in matrices else "tables"] += p.numel()
    if head is None or scores:
        multiplied = sums["matrices"]
    else:
        multiplied = sums["matrices"] + head.weight.numel()
    return sums | {"multiplied": multiplied, "adapter": adapter}
