"""TRL's GRPOTrainer and RLOOTrainer as oracles: their losses of the same responses, advantages and weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from models.tiny import tiny_model, tiny_tokenizer
from oracle import LORA, Told
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import align.grpo
from align.data.trees import plant
from align.grpo import Grpo, Share, token_weights
from align.models.roles import Roles
from align.models.sampling.rows import Response
from align.training.rollouts.epochs import Targets
from align.training.rollouts.rollout import Episodes, Rollout

MOST = 8


class Given(NamedTuple):
    """A minibatch: prompts (5,) with four responses each, and what was known of them before the update."""

    episodes: Episodes
    old_logprobs: Tensor  # (E, T)
    ref_logprobs: Tensor  # (E, T)
    advantages: Tensor  # (E,)
    learnt: Tensor  # (E,) bool
    importance: Tensor  # (E, T)


def made(roles: Roles) -> Given:
    """The actor has moved away from the one that sampled, so that clips decide; one response did not end."""
    draw, noise = np.random.default_rng(3), torch.Generator().manual_seed(4)
    prompts = [draw.integers(3, 200, 5).astype(np.int32) for _ in range(2)]
    lengths = [[3, 8, 1, 5], [7, 2, 8, 4]]
    said = [[Response(draw.integers(3, 200, k).astype(np.int32), k < MOST) for k in own] for own in lengths]
    episodes = Episodes(prompts, said)
    with torch.no_grad():
        batch = plant([episodes.tree(0), episodes.tree(1)])
        now = pad_sequence(roles(batch).logprobs.split(episodes.said.tolist()), batch_first=True)
    mask = now != 0
    old, ref = (now + scale * torch.randn(now.shape, generator=noise) * mask for scale in (0.6, 0.5))
    advantages, everyone = torch.randn(8, generator=noise), torch.ones(8, dtype=torch.bool)
    return Given(episodes, old, ref, advantages, everyone, mask.float())


def ours(roles: Roles, given: Given, **settings: object) -> Told:
    """`align.grpo.loss` on one packed batch."""
    roles.zero_grad()
    grpo = Grpo(rewards=[{"function": "a:b"}], generation={"max_new": MOST}, **settings)
    steps = torch.arange(MOST + 1) <= given.episodes.said[:, None]
    zeros = torch.zeros(8, MOST)
    grids = given.old_logprobs, given.ref_logprobs
    rollout = Rollout(*grids, zeros, torch.zeros(8, MOST + 1), steps[:, 1:], steps, given.episodes.said)
    known = given.old_logprobs, given.importance, given.ref_logprobs
    targets = Targets(rollout, torch.device("cpu"), known if grpo.kl == "loss" else known[:2])
    weights = token_weights(grpo, given.episodes.said, given.learnt, torch.arange(8))
    batch = plant([given.episodes.tree(0), given.episodes.tree(1)])
    total, _ = align.grpo.loss(roles, batch, grpo, targets, Share(given.advantages, weights))
    total.backward()
    named = {name: p.grad for name, p in roles.named_parameters() if p.requires_grad}
    return Told(total.item(), {name.removeprefix("trunk.causal."): grad for name, grad in named.items()}, [])


def trainer_of(kind: str, weights: dict[str, Tensor], folder: Path, temperature: float) -> GRPOTrainer | RLOOTrainer:
    """A trainer with these weights in its adapter."""
    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    settings = config(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=MOST, steps_per_generation=1,
        temperature=temperature, beta=0.5,
    )  # fmt: skip
    made = trainer(
        model=tiny_model("llama"), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8), processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    named = dict(made.model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def advantages_of(trainer: GRPOTrainer | RLOOTrainer, scores: Tensor) -> Tensor:
    """The trainer's, (N, k) -> (N, k): of responses that it samples, and that a reward function gives these scores."""
    found = [None if score.isnan() else float(score) for score in scores.flatten()]
    trainer.reward_funcs = [lambda completions, **_: found]
    sampled = trainer._generate_and_score_completions([{"prompt": "a"}] * len(found))
    return sampled["advantages"].view_as(scores)


def theirs(trainer: GRPOTrainer | RLOOTrainer, given: Given) -> Told:
    """The trainer's loss of the same responses, padded."""
    trainer.model.zero_grad()
    prompts = torch.from_numpy(np.stack(given.episodes.prompts).repeat(4, 0)).long()
    padded = partial(pad_sequence, batch_first=True)
    completions = [torch.from_numpy(response.tokens).long() for response in given.episodes.flat]
    mask = padded([torch.ones_like(ids) for ids in completions]) * given.learnt[:, None]
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded(completions, padding_value=2), "completion_mask": mask,
        "advantages": given.advantages, "num_items_in_batch": mask.sum(),
        "old_per_token_logps": given.old_logprobs, "ref_per_token_logps": given.ref_logprobs,
        "old_logps": given.old_logprobs.sum(1), "importance_sampling_ratio": given.importance,
    }  # fmt: skip
    value = trainer._compute_loss(trainer.model, inputs)
    value.backward()
    named = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return Told(value.item(), named, [])
