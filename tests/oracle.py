"""TRL's SFTTrainer as the oracle: what it makes of the same rows on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from align.data.trees import Tree, plant
from align.models.trunk import Trunk
from align.sft import loss

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Told(NamedTuple):
    """One batch's mean loss in float32, the gradient of every trained weight, and its tokens where they count."""

    loss: float
    gradients: dict[str, Tensor]
    rows: list[tuple[list[int], list[int]]]  # tokens, and labels with -100 where nothing is learnt


def ours(trunk: Trunk, trees: list[Tree]) -> Told:
    """`align.sft.loss` on one packed batch."""
    trunk.zero_grad()
    forest = plant(trees, packed=trunk.packed)
    total, metrics = loss(trunk, forest)
    (total / len(forest.labels)).backward()
    value, count = metrics["loss"]
    named = {name.removeprefix("causal."): p.grad for name, p in trunk.named_parameters() if p.requires_grad}
    rows = [(tree.segments[0].tolist(), np.where(tree.trained[0], tree.segments[0], -100).tolist()) for tree in trees]
    return Told(value.item() / count, named, rows)


def theirs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    weights: dict[str, Tensor],
    folder: Path,
    *,
    lora: bool,
    **settings: object,
) -> Told:
    """`SFTTrainer.compute_loss` on one padded batch; `weights` are put into its model by name."""
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    assert isinstance(trainer.model, PeftModel) == lora
    named = dict(trainer.model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    trainer._signature_columns = None
    examples = [trainer.train_dataset[i] for i in range(len(rows))]
    inputs = trainer.data_collator(examples)
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, dict(inputs))
    value.backward()
    kept = [row.bool() for row in inputs["attention_mask"]]
    made = [
        (ids[keep].tolist(), labels[keep].tolist())
        for ids, labels, keep in zip(inputs["input_ids"], inputs["labels"], kept, strict=True)
    ]
    return Told(value.item(), {name: named[name].grad for name in weights}, made)


def trained(trunk: Trunk) -> dict[str, Tensor]:
    """What trains, by the names that peft and transformers use."""
    return {n.removeprefix("causal."): p.detach().clone() for n, p in trunk.named_parameters() if p.requires_grad}


def assert_equal(found: Told, expected: Told, rtol: float = 1e-5) -> None:
    """Loss to `rtol`; all gradients together to `rtol` of their norm, and no weight's far off its own."""
    assert abs(found.loss - expected.loss) <= rtol * expected.loss
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = {name: (found.gradients[name], gradient) for name, gradient in expected.gradients.items()}
    assert all(gradient.abs().max() > 0 for _, gradient in pairs.values())
    differences = {name: (one - other).norm() / other.norm() for name, (one, other) in pairs.items()}
    assert max(differences.values()) <= 10 * rtol, max(differences, key=differences.get)
    apart = torch.cat([(one - other).flatten() for one, other in pairs.values()]).norm()
    whole = torch.cat([other.flatten() for _, other in pairs.values()]).norm()
    assert apart <= rtol * whole
