"""Proximal policy optimisation from a reward: actor, critic, reward and reference as roles on one trunk.

    accelerate launch -q -m align.ppo recipes/ppo.yaml

A step samples responses y to its prompts x, and gives every token the reward

    r_t = -kl_coef * KL_t + [t is the end of y] * score(x, y)

where KL_t estimates how far the actor has gone from the reference. With the critic's values V they give advantages A
and returns R (GAE); for some epochs over the step's responses the actor minimises the first, the critic the second of

    max(-A p/p_old, -A clip(p/p_old, 1 - e, 1 + e))
    max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2

(Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155; Huang et al. 2024, "The N+ Implementation
Details of RLHF with PPO", arXiv 2403.17031). Actor and reference are equal at the start, the critic is a copy of the
reward. Left out on purpose: a common weight of both losses (actor and critic share no trained weight, so each has its
own learning rate instead), and training the trunk itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from align.data.formats.prompts import prompts
from align.data.trees import Forest
from align.models.roles import CRITIC, Roles, Said
from align.objectives import advantages as adv
from align.objectives.losses import clipped_policy_loss, clipped_value_loss
from align.recipe.schema import BaseRecipe, Optim, PositiveInt
from align.training.launch import run_stage
from align.training.learner import Loss, Metrics, Work
from align.training.loop import Learnt, Loop
from align.training.rollouts.epochs import Targets, in_epochs, spent
from align.training.rollouts.experience import Experience, FromRewards
from align.training.rollouts.pretraining import Pretraining
from align.training.rollouts.rewards import Rewards, stands_on
from align.training.rollouts.rollout import check_samples, explained, figures, minibatches
from align.training.rollouts.sections import Rewarded, RewardedTrain, check_rewarded
from align.training.session import Session
from align.training.shards import load_trunk

ESTIMATORS = {"k1": adv.k1, "k2": adv.k2, "k3": adv.k3}
SAMPLING, ORDER = 5, 6  # tell the streams of random numbers apart


class Ppo(Rewarded):
    """What is rewarded, and how the actor learns from it."""

    samples: PositiveInt = 1
    """Responses to each prompt of a step; the prompt is computed once."""
    epochs: PositiveInt = 4
    """Passes over a step's responses."""
    critic_learning_rate: Annotated[float | None, Field(gt=0)] = None
    """Peak of the critic's learning rate, which follows the actor's schedule. Default: `optim.learning_rate`."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """First steps in which the critic alone learns."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL penalty."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How a token's KL is estimated (joschu.net/blog/kl-approx.html)."""
    kl_target: Annotated[float | None, Field(gt=0)] = None
    """Adapt `kl_coef` so that a response's KL comes to this, in nats (arXiv 1909.08593). Default: it is fixed."""
    kl_horizon: PositiveInt = 10_000
    """Responses over which the controller of `kl_target` works."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of GAE: 0 trusts the critic alone, 1 the rewards alone (arXiv 1506.02438)."""
    whiten: bool = True
    """Shift and scale a step's advantages to mean 0 and variance 1, over all its tokens."""
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    """p/p_old is clipped to this distance from 1."""
    dual_clip: Annotated[float | None, Field(gt=1)] = None
    """Bound of the loss of tokens with a negative advantage (arXiv 1912.09729). Default: none."""
    value_clip_range: Annotated[float, Field(gt=0)] = 0.2
    """How far a value may move from the one that the advantages came from."""

    def critic_rate(self, optim: Optim) -> float:
        """The critic's learning rate as a multiple of the actor's."""
        return (self.critic_learning_rate or optim.learning_rate) / optim.learning_rate


class Recipe(BaseRecipe):
    """A policy from a reward."""

    stage: Literal["ppo"]
    """This stage."""
    train: RewardedTrain = Field(default_factory=RewardedTrain)
    ppo: Ppo

    @model_validator(mode="after")
    def _fits_ppo(self) -> Recipe:
        check_rewarded(self, self.ppo, "ppo")
        return self


class Counts(NamedTuple):
    """What a minibatch's means are over."""

    tokens: int
    steps: int
    actor_learns: float  # 1, or 0 while the critic alone learns


def loss(
    roles: nn.Module, batch: Forest, ppo: Ppo, targets: Targets, counts: Counts, said: Said | None = None
) -> tuple[Tensor, Metrics]:
    """Policy and value loss of a batch, each its share of the minibatch's mean; `said`: what the roles say of it."""
    old_logprobs, advantages, old_values, returns = targets.of(batch)
    logprobs, values, entropy = said or roles(batch, entropy=ppo.entropy)
    log_ratio = logprobs - old_logprobs
    policy, held = clipped_policy_loss(log_ratio, advantages, ppo.clip_range, ppo.clip_range, ppo.dual_clip)
    value, value_held = clipped_value_loss(values, old_values, returns, ppo.value_clip_range)
    if ppo.entropy_coef:
        policy = policy - ppo.entropy_coef * entropy
    total = counts.actor_learns * policy.sum() / counts.tokens + value.sum() / counts.steps
    n = len(logprobs)
    return total, {
        "loss": (total, 0),
        "loss/policy": (policy.sum(), n),
        "loss/value": (value.sum(), len(value)),
        "clip_fraction": (held.sum(), n),
        "clip_fraction/value": (value_held.sum(), len(value)),
        "update_kl": (adv.k3(old_logprobs, logprobs.detach()).sum(), n),
        "moved": (log_ratio.detach().abs().sum(), n),
    }


class Algorithm(FromRewards):
    """PPO's step and evaluation."""

    def __init__(self, recipe: Recipe, experience: Experience, ptx: Pretraining | None) -> None:
        self.recipe, self.ppo, self.experience, self.ptx = recipe, recipe.ppo, experience, ptx

    def learn(self, loop: Loop, chosen: np.ndarray, rate: float) -> Learnt:
        """One step of PPO."""
        ppo, seed, step, started = self.ppo, self.recipe.seed, loop.step + 1, time.perf_counter()
        kl_coef, prompts = loop.memory.setdefault("kl_coef", ppo.kl_coef), loop.data.train

        # 1. Sample responses to the step's prompts.
        episodes = self.experience.sampled(loop, prompts, chosen, (seed, SAMPLING, step), ppo.samples)
        sampled_at = time.perf_counter()
        # 2. Score them; those that have a score are read by every role, in the rows of the first epoch.
        parts = self.experience.parts(loop, prompts, chosen, episodes, [np.arange(len(chosen))])
        score = self.experience.score(parts, episodes)
        means, drawn = self.experience.figures(parts, score, episodes), int(episodes.said.sum())
        known = self.experience.known(loop, score)
        episodes, score = episodes.kept(known), score[known]  # (E,)
        orders = [(seed, ORDER, step, epoch) for epoch in range(ppo.epochs)]
        epochs = [minibatches(len(episodes), ppo.minibatches, order) for order in orders]
        rollout = self.experience.read(loop, episodes, epochs[0], ppo.entropy or "known")

        # 3. Rewards: the KL penalty at every token, the score at the end.
        penalty = ESTIMATORS[ppo.kl_estimator](rollout.logprobs, rollout.ref_logprobs)
        rewards = torch.zeros_like(rollout.values)  # (E, T + 1)
        rewards[:, :-1] = -kl_coef * penalty.masked_fill(~rollout.tokens, 0)
        rewards[torch.arange(len(score)), rollout.lengths] += score

        # 4. Advantages of the tokens, returns of the steps.
        advantages, returns = adv.gae(rewards, rollout.values, rollout.steps, ppo.gamma, ppo.gae_lambda)
        of_tokens = advantages[:, :-1].masked_fill(~rollout.tokens, 0)
        if ppo.whiten:
            moments = adv.mean_variance(adv.moments(of_tokens, rollout.tokens))
            of_tokens = adv.whiten(of_tokens, rollout.tokens, *moments)
        of_tokens = of_tokens * rollout.importance  # 1 where the own engine drew them
        scored_at = time.perf_counter()

        # 5. Epochs of minibatches.
        targets = Targets(rollout, loop.trunk.device, (rollout.logprobs, of_tokens), (rollout.values, returns))
        actor_learns = step > ppo.critic_warmup

        def loss_of(numbers: np.ndarray, said: Said | None) -> Loss:
            tokens = int(rollout.lengths[numbers].sum())
            counts = Counts(tokens, tokens + len(numbers), float(actor_learns))
            return partial(loss, ppo=ppo, targets=targets, counts=counts, said=said)

        def beside(number: int) -> list[Work]:
            place = (step - 1) * ppo.epochs * ppo.minibatches + number
            return self.ptx.work(loop, place) if self.ptx and actor_learns else []

        passes = in_epochs(loop, chosen, rate, rollout, episodes, epochs, loss_of, beside, ppo.stop_kl)

        kl = float((rollout.logprobs - rollout.ref_logprobs).sum() / len(score))
        if ppo.kl_target:
            loop.memory["kl_coef"] = adv.adapted(kl_coef, kl, ppo.kl_target, ppo.kl_horizon, len(score))
        metrics = {
            **means,
            **figures(rollout, kl_coef, means["score"]),
            **passes.metrics,
            **explained(rollout, returns),
            "learning_rate": rate,
            f"learning_rate/{CRITIC}": rate * ppo.critic_rate(self.recipe.optim),
            **spent(started, sampled_at, scored_at, drawn),
        }
        self.experience.watch.learnt(loop, step, metrics)
        return Learnt(metrics, passes.distinct, int(episodes.lengths.sum()))

    def evaluate(self, loop: Loop) -> dict[str, Any]:
        """Scores of responses to the held-out prompts, and how far the actor has gone."""
        kl_coef = loop.memory.get("kl_coef", self.ppo.kl_coef)
        return self.experience.evaluated(loop, (self.recipe.seed, SAMPLING, 0), kl_coef)

    def described(self, loop: Loop, last: bool) -> dict[str, Any]:
        """What the result's align.json tells besides."""
        return {"kl_coef": loop.memory.get("kl_coef", self.ppo.kl_coef)}


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe = session.recipe
    others = {"ptx": recipe.ppo.ptx.reading(recipe.data)} if recipe.ppo.ptx else {}
    room = {"room": recipe.ppo.generation.max_new, "key": "ppo.generation.max_new"}
    if not (begun := session.begin(prompts(), others, **room, **stands_on(recipe.ppo.rewards, "ppo.rewards"))):
        return
    run, data, more = begun
    trunk = load_trunk(session)
    check_samples(trunk)
    rewards, temperature = Rewards(recipe.ppo.rewards, trunk, "ppo.rewards"), recipe.ppo.generation.temperature
    roles = Roles(trunk, recipe.lora, rewards.scorers, rewards.leading, temperature, recipe.seed)
    ptx = Pretraining(recipe.ppo.ptx, more["ptx"], recipe.seed) if recipe.ppo.ptx else None
    experience = Experience(session, data, roles, rewards, recipe.ppo, "ppo")
    algorithm = Algorithm(recipe, experience, ptx)
    Loop(session, run, trunk, data, algorithm, roles, {CRITIC: recipe.ppo.critic_rate(recipe.optim)}).run_all()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.ppo", train, argv)


if __name__ == "__main__":
    main()
