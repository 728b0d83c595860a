"""A scalar or class head on a base: transformers' own sequence-classification model, so that what is saved loads there.

A decoder's head reads the last token of a path; an encoder (BERT-like) has a head of its own, on whole padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.data.templates.ends import turn_ends
from align.models.quantized import like
from align.recipe.errors import UserError

BESIDE = "base_config.json"  # next to an adapter: its base's config, with names for the outputs


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the checkpoint reads in both directions, and predicts masked tokens instead of the next one."""
    written = " ".join(config.architectures or ())
    if config.is_encoder_decoder or "CausalLM" in written or "LMHeadModel" in written:
        return False
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def with_head(causal: PreTrainedModel, outputs: int, seed: int) -> PreTrainedModel:
    """The same decoder, without its output projection, under a new float32 head of `outputs` scores.

    The head starts from N(0, 1 / (d + 1)), as in "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031).
    """
    config = causal.config
    config.num_labels = outputs
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"model.base: transformers has no classification head for models of type {config.model_type}")
    with torch.device("meta"):
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]._from_config(config)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"model.base: the head of {type(model).__name__} is not one linear layer, which align needs")
    setattr(model, model.base_model_prefix, getattr(causal, causal.base_model_prefix))
    width = model.score.in_features
    draw = torch.Generator().manual_seed(seed)
    model.score = nn.Linear(width, outputs, bias=False)
    model.score.weight.data = torch.randn(outputs, width, generator=draw) / (width + 1) ** 0.5
    return like(model, causal)


def name_outputs(config: PretrainedConfig, labels: Sequence[str] | None) -> None:
    """Say in a config what the outputs are, as transformers reads it; a single one without a label is a reward."""
    names = list(labels or (["reward"] if config.num_labels == 1 else config.id2label.values()))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if len(names) == 1 else "single_label_classification"


def name_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Say in a config what rows are filled up with, so that transformers reads scores where they are; the tokenizer, or
    a copy, that fills them up so.

    It reads a decoder's score at the last token that is no padding. Where a text ends with the padding token, as with
    an end of turn that is both, that is a token too early. So the padding is a special token that ends neither a turn
    nor a plain text. Where there is none, the config names none: transformers then reads a single row at its last
    token, and refuses several.
    """
    text, chosen = config.get_text_config(), tokenizer.pad_token_id
    if not is_encoder(config):  # whose head reads at a place of its own
        ends = {*turn_ends(tokenizer).ids, *tokenizer("a")["input_ids"][-1:]}
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        usual = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
        free = (i for i in (*usual, *special) if i is not None and i not in ends and i < text.vocab_size)
        chosen = next(free, None)
    config.pad_token_id = text.pad_token_id = chosen
    if chosen not in (None, tokenizer.pad_token_id):
        tokenizer = deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    return tokenizer


def described(
    config: PretrainedConfig, labels: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, beside: bool
) -> PreTrainedTokenizerBase:
    """Say in a config what the outputs and the padding are; the tokenizer that goes with it.

    `beside`: it is an adapter's. Then its base may be loaded by the base's own config, so the padding stays the base's.
    """
    name_outputs(config, labels)
    return tokenizer if beside else name_padding(config, tokenizer)


def save_beside(config: PretrainedConfig, folder: Path) -> None:
    """Write a scoring model's config next to its adapter, for whoever loads the two.

    It has a name of its own: peft reads no config.json there, and transformers takes a folder with one for a whole
    model and looks for the base's weights in it.
    """
    config = deepcopy(config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.dtype = None  # that of the base's weights
    if hasattr(config, "quantization_config"):  # who loads it decides that anew
        del config.quantization_config
    config.to_json_file(folder / BESIDE)
