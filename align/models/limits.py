"""What a model can take, checked before its weights are loaded: positions, and tokens that it has a row for.

Learned positions are rows of a table, and there are no more. Rotary ones go on beyond what the model was trained on,
which is worth a remark. Which of them a model has is tried on its skeleton, not looked up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.data.examples import Examples
from align.models.base import base_config, empty_model
from align.models.checkpoints.adapters import token_names
from align.models.checkpoints.results import read_result
from align.models.lora import check_targets
from align.models.scoring import is_encoder
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model

NAMED = 5  # tokens without a row that are named one by one
TRIED = 12  # tokens of the trial; fewer positions than these no run can do with


class Limits(NamedTuple):
    """Of one model."""

    name: str
    positions: int | None  # rows of its table of positions
    reach: int | None  # positions that it was trained on, where more can be had
    rows: int  # tokens that it has an embedding for, those of its adapters and added ones included


class Wanted(NamedTuple):
    """What is to be put into a model."""

    examples: Examples
    room: int = 0  # tokens that are sampled after each
    key: str = ""  # that asks for them


def limits_of(section: Model, tokenizer: Tokenizer, lora: Lora | None, scores: bool) -> Limits:
    """From the base's config and the adapters' alone. UserError for a base or LoRA that cannot be."""
    config = base_config(section, scores)
    skeleton = _skeleton(section, config)
    added = tokenizer.convert_tokens_to_ids(section.add_tokens)
    if lora is not None:
        check_targets(skeleton, lora, bool(added), scores)
    for name in section.adapters:
        added = [*added, *read_result(name, "model.adapter").config.tokens]
    rows = max([len(skeleton.get_input_embeddings().weight), *(i + 1 for i in added)])
    positions = positions_of(config)
    return Limits(section.base, positions, None if positions else _reach(config), rows)


def check(limits: Limits, tokenizer: Tokenizer, wanted: Sequence[Wanted]) -> list[str]:
    """Remarks on what goes beyond a model's training; UserError with all that it cannot take."""
    problems, remarks = [], []
    for examples, room, key in wanted:
        if not len(examples):
            continue
        if limits.positions:
            problems += _too_long(limits, examples, room, key)
            examples.max_length = min(
                examples.max_length, limits.positions
            )  # answers put to other prompts are cut there
        elif limits.reach and (longest := int(examples.longest.max()) + room) > limits.reach:
            where = examples.where(int(examples.longest.argmax())) + (f" and {key}={room:,}" if room else "")
            remarks.append(
                f"{where} take {longest:,} positions; {limits.name} was trained on {limits.reach:,}, and may be worse "
                "beyond them"
            )
        problems += _unknown(limits, tokenizer, examples)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return list(dict.fromkeys(remarks))


def _too_long(limits: Limits, examples: Examples, room: int, key: str) -> list[str]:
    over = np.flatnonzero(examples.longest + room > limits.positions)
    if not len(over):
        return []
    longest = int(over[examples.longest[over].argmax()])
    after = f", and {key}: {room:,} is to fit after it" if room else ""
    remedy = f"set data.max_length={max(limits.positions - room, 1)} with data.overlong=drop"
    remedy = f"lower {key}, or {remedy}" if room else f"{remedy} or =truncate"
    return [
        f"{examples.where(longest)}: {int(examples.longest[longest]):,} tokens{after}, but {limits.name} has "
        f"{limits.positions:,} positions, and {len(over):,} of {len(examples):,} rows do not fit; {remedy}"
    ]


def _unknown(limits: Limits, tokenizer: Tokenizer, examples: Examples) -> list[str]:
    """A line for each token that has no embedding row, with the first row that has it."""
    if all(not part.store.tokens.size or int(part.store.tokens.max()) < limits.rows for part in examples.parts):
        return []  # at once for all: most sets are like this
    first: dict[int, str] = {}
    for i in range(len(examples)):
        for ids in examples.tree(i).segments:
            for token in np.unique(ids[ids >= limits.rows]).tolist():
                first.setdefault(token, examples.where(i))
    lines = [_no_row(limits, tokenizer, token, where) for token, where in first.items()]
    more = f"{len(lines) - NAMED:,} more tokens have no embedding row in {limits.name}"
    return lines[:NAMED] + [more] * (len(lines) > NAMED)


def _no_row(limits: Limits, tokenizer: Tokenizer, token: int, where: str) -> str:
    (text,) = token_names(tokenizer, [token])
    return (
        f"{where}: the token {text!r} has the number {token}, but {limits.name} has {limits.rows:,} embedding rows; "
        f"train one for it with model.add_tokens: [{json.dumps(text, ensure_ascii=False)}], or resize the base's "
        "embeddings (resize_token_embeddings) and save it"
    )


def check_prompt(
    limits: Limits, tokenizer: Tokenizer, ids: Sequence[int], room: int, where: str, key: str = "log.sample_tokens"
) -> list[str]:
    """Problems of one prompt that is answered by at most `room` tokens, as `key` says; `where` it stands."""
    problems = [_no_row(limits, tokenizer, token, where) for token in sorted({i for i in ids if i >= limits.rows})]
    if limits.positions and len(ids) + room > limits.positions:
        problems.append(
            f"{where}: {len(ids):,} tokens and an answer of up to {room:,} are more than the {limits.positions:,} "
            f"positions of {limits.name}; shorten it, or lower {key}"
        )
    return problems


def positions_of(config: PreTrainedConfig) -> int | None:
    """How long a text may be where each position has a row of a table; None where positions are computed."""
    return _positions(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _positions(kind: type[PreTrainedConfig], written: str) -> int | None:
    config = kind.from_dict(json.loads(written))
    ids = torch.full((1, TRIED), 5)
    given: dict[str, Any] = {"input_ids": ids}
    if not is_encoder(config):
        given |= {"position_ids": torch.arange(TRIED)[None], "use_cache": False}
    with suppress(Exception), torch.no_grad():  # where no model can be made, what loads it says so
        with torch.device("meta"):
            model = AutoModel.from_config(config).eval()
        for module in model.modules():  # what counts positions is there, weights are not
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
            model._init_weights(module)
        tables = _Tables()
        with suppress(Exception), tables:  # it ends where it needs other weights; positions are looked up before
            model(**given)
        return tables.rows
    return None


class _Tables(TorchFunctionMode):
    """Notes what a model without weights looks up while it runs on real tokens: a table that is asked for as many rows
    in sequence as there are tokens is one of positions."""

    rows: int | None = None  # after the first that is asked for

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        if function is torch.nn.functional.embedding:
            asked, table = given[:2]
            self._note(asked, len(table))
            return torch.zeros(*asked.shape, table.shape[1])
        if function is torch.nn.functional.linear:
            return torch.zeros(*given[0].shape[:-1], len(given[1]))
        if function is torch.nn.functional.layer_norm:
            return given[0]
        if function is torch.gather:
            self._note(given[2], given[0].shape[given[1]])
        return function(*args, **(kwargs or {}))

    def _note(self, asked: Tensor, rows: int) -> None:
        first, last = int(asked.min()), int(asked.max())
        if last - first == TRIED - 1:
            self.rows = rows - first


def _reach(config: PreTrainedConfig) -> int | None:
    """Positions that a model with rotary embeddings was made for, those of their scaling included."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    first, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if isinstance(first, int | float) and isinstance(factor, int | float):
        most = max(most or 0, int(first * factor))
    return most


def _skeleton(section: Model, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return empty_model(section, config, AutoModel if is_encoder(config) else AutoModelForCausalLM)
