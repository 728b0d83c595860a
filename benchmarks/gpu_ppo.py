"""The part of `gpu.py` that takes PPO's steps as `align.ppo` takes them, on a model with random weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from gpu_clock import ENOUGH_SECONDS, Row, Scale, forget_peak, process, synchronize
from gpu_models import LORA, Drawn, Shape, prompts, random_trunk
from peft import get_peft_model_state_dict
from rich.console import Console

from align import ppo
from align.data.examples import Ledger
from align.data.mixture import Prepared
from align.models.roles import CRITIC, Roles, Scorer
from align.models.trunk import Trunk
from align.training.costs import peak_memory
from align.training.loop import Loop
from align.training.rollouts.experience import Experience
from align.training.rollouts.rewards import Rewards
from align.training.rollouts.rollout import check_samples
from align.training.runs.run import Standing
from align.training.screen import Screen
from align.training.session import Session


def update(shape: Shape, scale: Scale, device: torch.device) -> Iterator[Row]:
    """PPO's step as `align.ppo` takes it, four roles on one trunk; without its eval, logs and checkpoints."""
    trunk, count = random_trunk(shape, device), scale.prompts[0]
    with tempfile.TemporaryDirectory() as folder:
        recipe = ppo.Recipe.model_validate(
            {
                "stage": "ppo", "run": folder, "model": {"base": shape.name}, "lora": LORA.model_dump(),
                "data": {"train": [{"path": "random"}]},
                "batch": {"examples": count, "row_tokens": shape.fitting(device, roles=2)},
                "optim": {"learning_rate": 1e-5, "schedule": "constant", "warmup": 0},
                "train": {"steps": 1 + scale.updates},
                "ppo": {
                    "rewards": [{"adapter": "random"}], "samples": scale.samples,
                    "generation": {"max_new": scale.new, "min_new": scale.new},
                },
            }
        )  # fmt: skip
        loop = ppo_loop(recipe, trunk, prompts(shape, count))
        took = np.zeros(4)  # seconds: sampling, scoring, epochs, all
        for number in range(1 + scale.updates):
            if number == 1:
                forget_peak(device)
            synchronize(device)
            begun = time.perf_counter()
            metrics = loop.algorithm.learn(loop, loop.plan.batch(number + 1), recipe.optim.learning_rate).metrics
            synchronize(device)
            seconds = time.perf_counter() - begun
            loop.step += 1
            said, scored = metrics["sample_seconds"], metrics["score_seconds"]  # both end with numbers on the CPU
            if number:
                took += said, scored, seconds - said - scored, seconds
            if took[-1] > ENOUGH_SECONDS:
                break
    updates, episodes = number, count * scale.samples
    more = {f"{name}_seconds": float(took[i]) / updates for i, name in enumerate(("sampling", "scoring", "epochs"))}
    what = f"{shape.name}, {count} prompts x {scale.samples}, {scale.new} new tokens, {recipe.ppo.epochs} epochs, align"
    yield Row("ppo", what, updates * episodes / float(took[-1]), "episodes", peak_memory(device), more)


def ppo_loop(recipe: ppo.Recipe, trunk: Trunk, examples: Drawn) -> Loop:
    """What `ppo.train` builds, with a random reward model on the trunk."""
    check_samples(trunk)
    head = torch.randn(1, trunk.plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    start = get_peft_model_state_dict(trunk.causal, adapter_name="default", save_embedding_layers=False)
    scorer = Scorer(None, 0.0, 1.0, recipe.lora, start, head / head.shape[1] ** 0.5)
    scores = Rewards([], trunk)
    scores.parts, scores.scorers = {"reward": recipe.ppo.rewards[0]}, {"reward": scorer}
    roles = Roles(trunk, recipe.lora, scores.scorers, scores.leading, recipe.ppo.generation.temperature, recipe.seed)
    session = Session(recipe, process(trunk.device), Console(quiet=True), fresh=True, show=False)
    run = SimpleNamespace(  # it saves and records nothing
        checkpoints=recipe.folder / "checkpoints", standing=Standing(), records=lambda name: []
    )
    data = Prepared(examples, examples, Ledger(), [])
    algorithm = ppo.Algorithm(recipe, Experience(session, data, roles, scores, recipe.ppo, "ppo"), None)
    loop = Loop(session, run, trunk, data, algorithm, roles, {CRITIC: recipe.ppo.critic_rate(recipe.optim)})
    loop.screen = Screen(session.console, loop.plan.steps)
    loop.learner.model.train()
    return loop
