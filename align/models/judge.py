"""Another sequence-classification model, with its own tokenizer, as a judge of texts: any checkpoint of transformers,
or a result of align.reward or align.classify on another trunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.data.templates.chat import Unwritable
from align.data.templates.chats import chat_of
from align.data.templates.control import controls_of
from align.data.templates.templates import with_defaults
from align.models.base import load_base
from align.models.checkpoints.adapters import plain_tokenizer, put, stands_on, stranger, token_without_row, trunk_of
from align.models.checkpoints.results import CONFIG, SCORING, read_about, read_result
from align.models.checkpoints.sources import (
    base_folder,
    check_weights,
    folder_on_disk,
    foreign,
    is_file,
    read_config,
    speaking_of,
)
from align.models.kept import cast, folded
from align.models.limits import positions_of
from align.models.quantized import is_quantized, numbers
from align.recipe.errors import UserError
from align.recipe.schema import Model

FETCH = "fetch it first, for nothing is fetched at the word of a result"
BATCH_TOKENS = 4096  # padding included


class Answer(Protocol):
    """A response to be judged."""

    asked: Any  # has `messages`, or None for the beginning of a text
    prompt: str
    response: str


class Judge:
    """A score for every response: the only output, or the log-odds of one class."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, label: int | None, longest: int) -> None:
        self.model, self.tokenizer, self.label, self.longest = model.eval(), tokenizer, label, longest
        self.fill = next(i for i in (model.config.pad_token_id, tokenizer.pad_token_id, 0) if i is not None)

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One score each, whatever is judged beside it (to float tolerance)."""
        ids = [self._ids(answer) for answer in answers]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = [0.0] * len(ids)
        first = 0
        while first < len(order):
            last = first + 1
            while last < len(order) and (last + 1 - first) * len(ids[order[last]]) <= BATCH_TOKENS:
                last += 1
            chosen = order[first:last]
            for i, score in zip(chosen, self._scores([ids[i] for i in chosen]), strict=True):
                scores[i] = score
            first = last
        return scores

    def _scores(self, ids: list[list[int]]) -> list[float]:
        tokens, mask = self._padded(ids)
        logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        if self.label is None:
            return logits[:, 0].tolist()
        others = torch.cat([logits[:, : self.label], logits[:, self.label + 1 :]], 1)
        return (logits[:, self.label] - others.logsumexp(1)).tolist()

    def _padded(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest, fill = max(map(len, ids)), self.fill
        if hasattr(self.model, "score"):  # a decoder is read at the last token that is not the filling
            used = set().union(*ids)
            fill = next(i for i in range(len(used) + 1) if i not in used)
            self.model.config.pad_token_id = fill
        tokens = torch.full((len(ids), longest), fill)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, part in enumerate(ids):
            tokens[row, : len(part)] = torch.tensor(part)
            mask[row, : len(part)] = 1
        return tokens.to(self.model.device), mask.to(self.model.device)

    def _ids(self, answer: Answer) -> list[int]:
        """Prompt and response as this model's own tokenizer writes them, up to the end of the response's turn; of what
        is too long, the end."""
        messages, tokenizer = answer.asked.messages, self.tokenizer
        try:
            controls = controls_of(tokenizer)
            if messages is not None and tokenizer.chat_template:
                talk = controls.disguised([*messages, {"role": "assistant", "content": answer.response}])
                text, written = chat_of(tokenizer).written(talk), True
            else:
                before = answer.asked.text if messages is None else messages[-1]["content"] + "\n"
                text, written = controls.disguised(before + answer.response), False
        except (Unwritable, UserError) as error:
            name = tokenizer.name_or_path
            raise UserError(f"{name}: its chat template cannot write what it is to judge ({error})") from None
        ids = controls.encode([text], add_special_tokens=not written)[0].ids.tolist()
        if fault := token_without_row(self.tokenizer, ids, len(self.model.get_input_embeddings().weight)):
            raise UserError(f"{self.tokenizer.name_or_path}: what it is to judge {fault}")
        return (ids or [self.fill])[-self.longest :]


def read_judge(name: str, label: str | int | None, key: str, device: torch.device, dtype: torch.dtype) -> Judge:
    """The model behind a folder or hub id; UserError, which names the `key`, where there is none to be used.

    `dtype`: what it computes in. No code beside it runs.
    """
    told = f"{key}.model: {name} cannot be loaded as a sequence classifier"
    folder = Path(name)
    about = read_about(folder, f"{key}.model")
    with speaking_of(f"{key}.model"):
        if is_file(folder / CONFIG):
            model = _with_adapter(name, about is not None, f"{key}.model", device, dtype)
        else:
            folder = base_folder(Model(base=name))
            config = read_config(folder, told)
            check_weights(folder, config, name)
            with foreign(told):
                model, loaded = AutoModelForSequenceClassification.from_pretrained(
                    folder, config=config, dtype="auto", use_safetensors=True, output_loading_info=True
                )
            _check_whole(model, loaded, told)
    tokenizer = plain_tokenizer(folder, f"{key}.model")
    if tokenizer.chat_template:
        tokenizer.chat_template = with_defaults(tokenizer, {}, None)  # its scores are the same on every day
    labels = about.labels if about else None
    chosen = _label(model, label, labels, name, key)
    longest = (about and about.max_length) or 4096
    if limit := positions_of(model.config):
        longest = min(longest, limit)
    model = model if is_quantized(model) else model.to(device, dtype)
    cast(model.requires_grad_(False), dtype)
    if not all(torch.isfinite(p).all() for _, p in numbers(model)):
        raise UserError(f"{told} (it has values that are not finite numbers in {dtype})")
    return Judge(model, tokenizer, chosen, longest)


def _check_whole(model: PreTrainedModel, loaded: dict[str, Any], told: str) -> None:
    """UserError where weights of the file are missing, which would be random in silence."""
    if lacking := sorted(loaded["missing_keys"]):
        raise UserError(f"{told} (it lacks {lacking[0]}, so it is no finished one)")


def _with_adapter(name: str, ours: bool, key: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A base with its adapter and head merged in, so that it runs as fast as the base; a quantised one keeps them, and
    is on its device."""
    result = read_result(name, key, "a finished reward or classify run", ours)
    heads = [weight for name, weight in result.weights.items() if name.endswith(("score.weight", "out_proj.weight"))]
    heads += [weight for name, weight in result.weights.items() if name.endswith("classifier.weight")]
    if not heads:
        raise UserError(f"{key}: {result.folder} has no head that scores")
    outputs = len(heads[0])
    if ours:
        if result.about.stage not in SCORING:
            raise UserError(f"{key}: {result.folder} is a result of stage {result.about.stage}, which scores nothing")
        section = trunk_of(result, key, FETCH)
        if section.quantize:
            section = section.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        else:
            section, device = section.model_copy(update={"dtype": "float32"}), torch.device("cpu")
        base = load_base(section, device, frozen=True, outputs=outputs)
        if not stands_on(result, base):
            raise UserError(f"{key}: {stranger(result, base, 'this trunk')}")
        model = base.model
    else:
        source = result.config.base_model_name_or_path or ""
        folder = folder_on_disk(source)
        if folder is None:
            raise UserError(f"{key}: {name} is an adapter on {source!r}, which is not on this machine; {FETCH}")
        config = read_config(folder, f"{key}: {source}")
        config.num_labels = outputs
        check_weights(folder, config, f"{key}: {source}")
        with foreign(f"{key}: {source} cannot be loaded as a sequence classifier"):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True
            )
    with foreign(f"{key}: {result.folder} cannot be put on its base"):
        adapted = get_peft_model(model, result.config.peft("SEQ_CLS"))
        put(adapted, result.weights, "default", f"{key}: {result.folder}")
        return folded(adapted)


def _label(model: PreTrainedModel, label: str | int | None, known: list[str] | None, name: str, key: str) -> int | None:
    count = model.config.num_labels
    names = known or [model.config.id2label.get(i, str(i)) for i in range(count)]
    if count == 1:
        if label is not None:
            raise UserError(f"{key}.label: {name} has a single score, so leave it out")
        return None
    if isinstance(label, int) and 0 <= label < count:
        return label
    if label in names:
        return names.index(label)
    raise UserError(f"{key}.label: {name} has {count} classes, {', '.join(names[:12])}; name the one to be scored")
