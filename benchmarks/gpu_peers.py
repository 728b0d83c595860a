"""TRL on the shapes and examples of `gpu.py`: SFT, and GRPO, which has a policy and a reference but no critic."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_clock import WARM_STEPS, Row, Scale, forget_peak
from gpu_models import END, LONGEST, LORA, Shape, conversations, prompts, random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from align.training.costs import peak_memory

EPOCHS = 4  # over the responses of a step: PPO's default here


class Clock(TrainerCallback):
    """The ends of steps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *_args: object, **_more: object) -> None:
        """A peak counts from the first step's end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            forget_peak(self.device)


def sft(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """TRL's SFTTrainer on the same conversations, packed to rows of their longest; it attends across them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    length = min(LONGEST, shape.row_tokens)
    model, clock = random_model(shape, device), Clock(device)
    rows = [{"input_ids": tree.segments[0].tolist()} for tree in conversations(shape, scale.conversations).trees]
    at_once = max(1, shape.fitting(device) // length)
    with tempfile.TemporaryDirectory() as folder:
        steps = WARM_STEPS + scale.steps
        config = SFTConfig(
            **common(folder, device, steps), packing=True, max_length=length, per_device_train_batch_size=at_once
        )
        trainer = SFTTrainer(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(shape),
            peft_config=lora(), callbacks=[clock],
        )  # fmt: skip
        collate, tokens = trainer.data_collator, []

        def counting(features: list[dict[str, Any]]) -> dict[str, Any]:
            tokens.append(sum(len(feature["input_ids"]) for feature in features))
            return collate(features)

        trainer.data_collator = counting
        loss = trainer.train().training_loss
    first = min(WARM_STEPS, len(clock.ends) - 1)  # few rows are few steps
    rate = sum(tokens[first : len(clock.ends)]) / (clock.ends[-1] - clock.ends[first - 1])
    what = f"{shape.name}, TRL, packing, {at_once} rows of {length:,}"
    yield Row("trl", what, rate, "tokens", peak_memory(device), {"loss": loss})


def grpo(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """A step of TRL's GRPOTrainer: as many episodes as PPO's step, as many epochs, transformers' `generate`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    count, clock = scale.prompts[0], Clock(device)
    texts = [" ".join(map(str, tree.segments[0])) for tree in prompts(shape, count).trees]
    episodes = count * scale.samples
    at_once = min(episodes, max(1, shape.fitting(device) // (256 + scale.new)))
    while episodes % at_once:
        at_once -= 1
    with tempfile.TemporaryDirectory() as folder:
        steps = EPOCHS * (1 + scale.updates)
        config = GRPOConfig(
            **common(folder, device, steps), per_device_train_batch_size=at_once,
            gradient_accumulation_steps=episodes // at_once, num_generations=scale.samples, num_iterations=EPOCHS,
            max_completion_length=scale.new, beta=0.05, generation_kwargs={"min_new_tokens": scale.new},
        )  # fmt: skip
        trainer = GRPOTrainer(
            random_model(shape, device), worth, config, train_dataset=Dataset.from_list([{"prompt": t} for t in texts]),
            processing_class=tokenizer(shape), peft_config=lora(), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[EPOCHS - 1]  # all but the first step's
    what = f"{shape.name}, {count} prompts x {scale.samples}, {scale.new} new tokens, {EPOCHS} epochs, TRL's GRPO"
    yield Row("grpo", what, scale.updates * episodes / seconds, "episodes", peak_memory(device), {})


def worth(completions: list[str], **_more: object) -> list[float]:
    """Of each response: something that differs."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def common(folder: str, device: torch.device, steps: int) -> dict[str, Any]:
    """What both trainers are given."""
    cuda = device.type == "cuda"
    return {
        "output_dir": folder, "use_cpu": not cuda, "bf16": cuda, "max_steps": steps, "learning_rate": 1e-5,
        "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "logging_steps": 10**6,
        "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip


def lora() -> Any:
    """The same adapter as ours."""
    from peft import LoraConfig

    return LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Each number below the vocabulary's size is the token of that number."""
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocabulary)}, unk_token=str(END)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=str(END), pad_token=str(END), unk_token=str(END), padding_side="left"
    )
