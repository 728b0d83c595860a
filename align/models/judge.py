"""Another sequence-classification model, with its own tokenizer, as a judge of texts: any checkpoint of transformers,
or a result of align.reward or align.classify on another trunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.data.chat import Unwritable
from align.data.chats import chat_of
from align.data.control import controls_of
from align.models.base import about_result, base_folder, weights_fingerprint
from align.recipe.errors import UserError
from align.recipe.schema import Model

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
        return (ids or [self.fill])[-self.longest :]


def read_judge(name: str, label: str | int | None, key: str, device: torch.device, dtype: torch.dtype) -> Judge:
    """The model behind a folder or hub id; UserError, which names the `key`, where there is none to be used.

    `dtype`: what it computes in.
    """
    folder = Path(name).expanduser()
    about = about_result(folder, f"{key}.model")
    adapter = folder / "adapter_config.json"
    try:
        if adapter.is_file():
            model = _with_adapter(folder, json.loads(adapter.read_text("utf-8")), about)
        else:
            folder = base_folder(Model(base=name))
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UserError as error:
        raise UserError(*(f"{key}.model: {problem}" for problem in error.problems)) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{key}.model: {name} cannot be loaded as a sequence classifier ({why})") from None
    chosen = _label(model, label, about.get("labels"), name, key)
    longest = about.get("max_length") or getattr(model.config, "max_position_embeddings", None) or 4096
    model = model.to(device, dtype).requires_grad_(False)
    return Judge(model, tokenizer, chosen, longest)


def _with_adapter(folder: Path, config: dict[str, Any], about: dict[str, Any]) -> PreTrainedModel:
    """A base with its adapter and head merged in, so that it runs as fast as the base."""
    source = config["base_model_name_or_path"]
    if about and about["fingerprint"] != weights_fingerprint(base_folder(Model(base=source))):
        raise UserError(
            f"{folder} was not trained on {source} as it is, but on other weights, such as with an SFT adapter merged "
            "into it; save base and adapter merged, and train it on that (docs/reward.md)"
        )
    heads = [key for key in load_file(folder / "adapter_model.safetensors") if key.endswith("score.weight")]
    outputs = len(about["labels"]) if about.get("labels") else 1
    if not heads and not about:
        outputs = AutoConfig.from_pretrained(source).num_labels
    base = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=outputs, dtype=torch.float32, use_safetensors=True
    )
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


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
