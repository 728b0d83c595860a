"""TRL's DPOTrainer and RewardTrainer as oracles: what they make of the same token ids on the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from oracle import LORA, Told
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

import align.dpo
import align.reward
from align.data.trees import Tree, plant
from align.dpo import Dpo
from align.models.trunk import Trunk
from align.objectives.losses import path_sums
from align.reward import Reward
from align.training.reference import Mismatched, Reference


class Pair(NamedTuple):
    """Token ids; the answers follow the prompt, end of turn included."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Answer(NamedTuple):
    """Token ids of a single answer, and the verdict on it."""

    prompt: list[int]
    answer: list[int]
    good: bool


def as_tree(*segments: list[int], targets: tuple[float, ...] = ()) -> Tree:
    """A prompt and its answers, best first; all tokens of the answers are labels."""
    marks = tuple(np.full(len(ids), b > 0) for b, ids in enumerate(segments))
    return Tree(tuple(np.array(ids, np.int32) for ids in segments), marks, targets)


def dpo(trunk: Trunk, pairs: list[Pair], kind: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`align.dpo.loss` of one batch as a mean, with its gradient still to be taken; IPO per token, as TRL has it."""
    forest = plant([as_tree(*pair) for pair in pairs], packed=trunk.packed)
    section = Dpo(loss=kind, beta=beta, label_smoothing=label_smoothing, length_normalized=kind == "ipo")
    total, metrics = align.dpo.loss(trunk, forest, section, Reference(trunk))
    assert metrics["loss"][1] == len(pairs)
    return total / len(pairs)


def reward(trunk: Trunk, pairs: list[Pair], margins: list[float], centring: float) -> Tensor:
    """`align.reward.loss` of one batch as a mean, with its gradient still to be taken."""
    trees = [as_tree(*pair, targets=(margin, 0.0)) for pair, margin in zip(pairs, margins, strict=True)]
    total, metrics = align.reward.loss(trunk, plant(trees, packed=trunk.packed), Reward(centring=centring))
    assert metrics["loss"][1] == len(pairs)
    return total / len(pairs)


def kto(trunk: Trunk, answers: list[Answer], beta: float, weights: tuple[float, float]) -> Tensor:
    """`align.dpo.kto_loss` of one batch as a mean, with its gradient still to be taken."""
    trees = [as_tree(prompt, answer, targets=(float(good),)) for prompt, answer, good in answers]
    reference = Reference(trunk)
    others = plant(Mismatched(SimpleNamespace(tree=trees.__getitem__, max_length=10**6), np.arange(len(trees))).trees)
    with torch.no_grad():
        ratios = path_sums(trunk(others), others.path, others.paths) - reference(others)
    reference.baseline = max(ratios.mean().item(), 0.0)
    assert reference.baseline > 0, "a baseline of 0 would prove little"
    section = Dpo(loss="kto", beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    total, _ = align.dpo.kto_loss(trunk, plant(trees), section, reference)
    return total / len(trees)


def told(trunk: Trunk, loss: Tensor) -> Told:
    """A loss with the gradients of all that trains, by the names that peft and transformers use."""
    named = {name.removeprefix("causal."): p for name, p in trunk.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    return Told(loss.item(), dict(zip(named, gradients, strict=True)), [])


ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "max_length": None,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


class GivenDPO(DPOTrainer):
    """Takes rows that are token ids already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def trl_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    weights: dict[str, Tensor],
    folder: Path,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Told:
    """`DPOTrainer.compute_loss` on one padded batch, the bare base its reference."""
    config = DPOConfig(**ON_CPU, output_dir=str(folder), loss_type=[kind], beta=beta, label_smoothing=label_smoothing)
    rows = [{f"{name}_ids": ids for name, ids in pair._asdict().items()} for pair in pairs]
    trainer = GivenDPO(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    return _told(trainer, rows, weights)


class GivenKTO(KTOTrainer):
    """Takes rows that are token ids already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def trl_kto(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: list[Answer],
    weights: dict[str, Tensor],
    folder: Path,
    beta: float,
    balance: tuple[float, float],
) -> Told:
    """`KTOTrainer.compute_loss` on one padded batch; the mismatched answer is the next row's, as ours is."""
    rows = [
        {"prompt_ids": own.prompt, "completion_ids": own.answer, "KL_completion_ids": other.answer, "label": own.good}
        for own, other in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    config = KTOConfig(
        **ON_CPU,
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        beta=beta,
        desirable_weight=balance[0],
        undesirable_weight=balance[1],
    )
    trainer = GivenKTO(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    return _told(trainer, rows, weights)


def trl_reward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    weights: dict[str, Tensor],
    folder: Path,
    margins: list[float],
    centring: float,
) -> Told:
    """`RewardTrainer.compute_loss` on one padded batch of a sequence-classification model.

    It reads the last token that is not padding: the tokenizer's pad token must not be one that answers end on.
    """
    assert all(tokenizer.pad_token_id not in ids for pair in pairs for ids in pair)
    rows = [
        {"chosen_ids": pair.prompt + pair.chosen, "rejected_ids": pair.prompt + pair.rejected, "margin": margin}
        for pair, margin in zip(pairs, margins, strict=True)
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**ON_CPU, output_dir=str(folder), center_rewards_coefficient=centring or None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA | {"task_type": "SEQ_CLS"}),
    )
    return _told(trainer, rows, weights)


def _told(trainer: Trainer, rows: list[dict], weights: dict[str, Tensor]) -> Told:
    """Loss and gradients of all rows at once; `weights` are put into the trainer's model by name."""
    assert isinstance(trainer.model, PeftModel)
    named = dict(trainer.model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    gradients = torch.autograd.grad(loss, [named[name] for name in weights])
    return Told(loss.item(), dict(zip(weights, gradients, strict=True)), [])
