"""What plain transformers and peft compute from a run's result: one answer at a time, without a layer of ours."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def spoken(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[Tensor, int]:
    """Token ids (1, n) of the conversation up to its end of turn, and where the answer begins."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    before = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(before)] == before
    assert ids[-1] == tokenizer.eos_token_id
    return torch.tensor([ids]), len(before)


class Scorer(NamedTuple):
    """A reward model as anyone would load it."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, final: Path, base: Path | PreTrainedModel | None) -> Scorer:
        """`base`: what the adapter lies on; None where all weights were trained."""
        if not isinstance(base, PreTrainedModel):
            base = AutoModelForSequenceClassification.from_pretrained(base or final, num_labels=1)
        model = PeftModel.from_pretrained(base, final) if (final / "adapter_config.json").is_file() else base
        model.config.pad_token_id = None  # it is the end of turn too, and the score is read there
        return cls(model.eval(), AutoTokenizer.from_pretrained(final))

    def score(self, prompt: str, answer: str) -> float:
        """At the answer's end of turn."""
        with torch.no_grad():
            return self.model(spoken(self.tokenizer, prompt, answer)[0]).logits.item()


class Said(NamedTuple):
    """What a policy and its reference make of an answer."""

    policy: float  # log-probability of the whole answer
    reference: float
    tokens: int
    kl: float  # KL(policy || reference) over the vocabulary, summed over the answer's tokens


class Policy(NamedTuple):
    """A policy as anyone would load it, beside what it started from."""

    model: torch.nn.Module
    reference: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, final: Path, base: Path | PreTrainedModel) -> Policy:
        """`base`: what it was trained on."""
        adapted = (final / "adapter_config.json").is_file()
        reference, model = (
            deepcopy(part) if isinstance(part, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(part)
            for part in (base, base if adapted else final)
        )
        model = PeftModel.from_pretrained(model, final) if adapted else model
        return cls(model.eval(), reference.eval(), AutoTokenizer.from_pretrained(final))

    def says(self, prompt: str, answer: str) -> Said:
        """Of an answer, token by token."""
        ids, start = spoken(self.tokenizer, prompt, answer)
        labels = ids[0, start:, None]
        with torch.no_grad():
            ours, theirs = (
                model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in (self.model, self.reference)
            )
        kl = (ours.exp() * (ours - theirs)).sum().item()
        return Said(ours.gather(1, labels).sum().item(), theirs.gather(1, labels).sum().item(), len(labels), kl)


def merged(base: Path, sft: Path) -> Any:
    """base + merged SFT adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sft).merge_and_unload()
