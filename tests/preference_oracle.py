"""TRL's DPOTrainer and RewardTrainer as oracles: what they make of the same token ids on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from oracle import LORA, Told
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from align.data.trees import Tree, plant
from align.models.trunk import Trunk
from align.objectives import losses


class Pair(NamedTuple):
    """Token ids; the answers follow the prompt, end of turn included."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def as_tree(pair: Pair) -> Tree:
    """Prompt and two branches, best first, all of whose tokens are labels."""
    segments = tuple(np.array(ids, np.int32) for ids in pair)
    return Tree(segments, tuple(np.full(len(ids), b > 0) for b, ids in enumerate(segments)))


def dpo(trunk: Trunk, pairs: list[Pair], kind: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Our mean DPO loss of one batch, with its gradient still to be taken; IPO per token, as TRL has it."""
    forest = plant([as_tree(pair) for pair in pairs], packed=trunk.packed)
    with torch.no_grad(), trunk.adapters_off():
        reference = trunk(forest)
    rewards = losses.path_sums(trunk(forest) - reference, forest.path, forest.paths)
    if kind == "ipo":
        rewards = rewards / losses.path_counts(forest.path, forest.paths)
    better, worse = losses.preference_pairs(forest.owner, adjacent=False)
    ratio = rewards[better] - rewards[worse]
    settings = {"label_smoothing": label_smoothing} if kind in ("sigmoid", "robust") else {}
    return getattr(losses, kind)(ratio, beta, **settings).mean()


def reward(trunk: Trunk, pairs: list[Pair], margins: list[float], centring: float) -> Tensor:
    """Our mean reward loss of one batch, with its gradient still to be taken."""
    forest = plant([as_tree(pair) for pair in pairs], packed=trunk.packed)
    scores = trunk(forest)[:, 0]
    better, worse = (scores[paths] for paths in losses.preference_pairs(forest.owner, adjacent=False))
    ranked = losses.bradley_terry(better, worse, torch.tensor(margins))
    return (ranked + centring * losses.centring(better, worse)).mean()


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
