"""Group relative policy optimisation: a response is worth what it scores beside the other responses to its prompt.

    accelerate launch -q -m align.grpo recipes/grpo.yaml

A step samples k responses y_1 … y_k to each of its prompts x and scores them. There is no critic: the advantage of a
response, and so of each of its tokens, comes from its group,

    A_i = (s_i - mean(s_1 … s_k)) / std(s_1 … s_k)

For some epochs over the step's responses the actor minimises, token by token,

    max(-A p/p_old, -A clip(p/p_old, 1 - low, 1 + high)) + kl_coef * KL(p, ref)

(Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300). Actor and reference are equal at the start. Variants: Dr. GRPO,
RLOO and REINFORCE++ have other advantages, GSPO and CISPO other ratios, DAPO other means and two clips; docs/grpo.md
says which settings make which. Left out on purpose: a reference that moves, several turns with tools, and soft gates in
place of the clip (SAPO, VESPO).
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
from align.models.roles import Roles, Said
from align.objectives import groups
from align.objectives.advantages import k1, k3
from align.objectives.losses import clipped_policy_loss, response_log_ratios, weighted_policy_loss
from align.recipe.schema import BaseRecipe, PositiveInt
from align.training.launch import run_stage
from align.training.learner import Loss, Metrics, Work
from align.training.loop import Learnt, Loop
from align.training.rollouts.epochs import Targets, in_epochs, spent
from align.training.rollouts.experience import Experience, FromRewards
from align.training.rollouts.pretraining import Pretraining
from align.training.rollouts.rewards import Rewards, stands_on
from align.training.rollouts.rollout import Episodes, check_samples, figures, minibatches
from align.training.rollouts.sections import Rewarded, RewardedTrain, check_rewarded
from align.training.session import Session
from align.training.shards import load_trunk

ADVANTAGES = {  # by name, of scores (N, k)
    "group": groups.standardised,
    "mean": groups.centred,
    "leave_one_out": groups.leave_one_out,
    "batch": groups.of_batch,
}
SAMPLING, ORDER, ANEW = 5, 6, 7  # tell the streams of random numbers apart


class Grpo(Rewarded):
    """What is rewarded, and how the actor learns from groups of responses."""

    samples: PositiveInt = 8
    """Responses to each prompt of a step, its group; the prompt is computed once."""
    epochs: PositiveInt = 1
    """Passes over a step's responses."""
    advantage: Literal["group", "mean", "leave_one_out", "batch"] = "group"
    """What a score is compared with: its group's mean, in units of its spread (`group`); the mean alone (`mean`, arXiv
    2503.20783); the mean of the others (`leave_one_out`, arXiv 2402.14740); mean and spread of all responses of the
    step (`batch`, arXiv 2501.03262)."""
    ratio: Literal["token", "sequence", "product", "cispo"] = "token"
    """What is clipped: p/p_old of each token (`token`); its geometric mean over the response (`sequence`, GSPO, arXiv
    2507.18071); its product (`product`, as RLOO); or p/p_old only as a weight without gradient (`cispo`, arXiv
    2506.13585)."""
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """How far a ratio may count below 1. `cispo` has no lower clip."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """How far it may count above 1."""
    dual_clip: Annotated[float | None, Field(gt=1)] = None
    """The most that a ratio may count where the advantage is negative (arXiv 1912.09729). Default: no bound."""
    mean_over: Literal["tokens", "responses", "length_free"] = "tokens"
    """The loss is a mean over a minibatch's tokens (DAPO), over its responses of the mean over each one's tokens
    (DeepSeekMath), or a sum over responses x `generation.max_new` (Dr. GRPO)."""
    kl: Literal["loss", "reward", "none"] = "loss"
    """Where the distance to the reference counts: k3 at every token of the loss; k1 over the response, taken off its
    score; or nowhere, and no step asks the reference."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.04
    """Its weight."""
    kl_unbiased: bool = True
    """Weigh k3 by p/p_old, so that its gradient is that of KL(p, ref) (arXiv 2512.02556). Else it is KL(ref, p)'s."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Groups whose scores are all equal say nothing of better and worse: they only hold the actor at the reference
    (`keep`), or are not learnt from (`drop`, as DAPO)."""
    resample: Annotated[int, Field(ge=0)] = 0
    """How often such a group is sampled anew before that."""
    unended: Literal["keep", "mask"] = "keep"
    """Responses that did not end are learnt from like others, or only scored (`mask`, as DAPO)."""
    overlong_tokens: Annotated[int, Field(ge=0)] = 0
    """Over so many last tokens of `generation.max_new` a penalty rises from 0 to `overlong_penalty`; 0: none (DAPO)."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken off the score of a response of `generation.max_new` tokens."""

    def penalty(self, lengths: Tensor, ended: Tensor) -> Tensor:
        """That of all rewards, and the overlong one."""
        common = super().penalty(lengths, ended)
        if not self.overlong_tokens:
            return common
        far = groups.overlong(lengths, self.generation.max_new, self.overlong_tokens)
        return common + self.overlong_penalty * far


class Recipe(BaseRecipe):
    """A policy from a reward, without a critic."""

    stage: Literal["grpo"]
    """This stage."""
    train: RewardedTrain = Field(default_factory=RewardedTrain)
    grpo: Grpo

    @model_validator(mode="after")
    def _fits_grpo(self) -> Recipe:
        grpo = self.grpo
        check_rewarded(self, grpo, "grpo")
        if grpo.advantage != "batch" and grpo.samples < 2:
            raise ValueError(
                f"`grpo.samples`: the advantage {grpo.advantage} compares the responses to one prompt; give 2 or more, "
                "or take `grpo.advantage: batch`"
            )
        if grpo.advantage == "batch" and (grpo.resample or grpo.equal_groups == "drop"):
            raise ValueError(
                "`grpo.advantage: batch` compares all responses, and learns from equal groups too; leave "
                "`grpo.equal_groups` and `grpo.resample` out"
            )
        if grpo.overlong_tokens > grpo.generation.max_new:
            raise ValueError("`grpo.overlong_tokens`: there are more than `grpo.generation.max_new`")
        if grpo.dual_clip and (grpo.ratio == "cispo" or grpo.dual_clip <= 1 + grpo.clip_high):
            raise ValueError("`grpo.dual_clip` goes beyond 1 + `grpo.clip_high`, and is not for the ratio cispo")
        return self


class Share(NamedTuple):
    """Of each episode what it has in a minibatch's loss, on the device."""

    advantages: Tensor  # (E,)
    weights: Tensor  # (E,) of each of its tokens; 0 where it is not learnt from


def loss(
    roles: nn.Module, batch: Forest, grpo: Grpo, targets: Targets, share: Share, said: Said | None = None
) -> tuple[Tensor, Metrics]:
    """Loss of a batch, its share of the minibatch's mean; `said`: what the actor says of it."""
    old_logprobs, importance, *reference = targets.of(batch)
    advantages, weights = (each[batch.targets.long()][batch.path] for each in share)
    advantages = advantages * importance  # 1 where the own engine drew the token
    logprobs, _, entropy = said or roles(batch, valued=False, entropy=grpo.entropy)
    log_ratio = moved = logprobs - old_logprobs
    if grpo.ratio in ("sequence", "product"):
        log_ratio = response_log_ratios(log_ratio, batch.path, batch.paths, per_token=grpo.ratio == "sequence")
    if grpo.ratio == "cispo":
        values, held = weighted_policy_loss(logprobs, log_ratio, advantages, grpo.clip_high)
    else:
        values, held = clipped_policy_loss(log_ratio, advantages, grpo.clip_low, grpo.clip_high, grpo.dual_clip)
    n, learnt = len(logprobs), weights > 0
    metrics = {"loss/policy": (values[learnt].sum(), learnt.sum())}
    if grpo.kl == "loss":
        kl = k3(logprobs, *reference) * (log_ratio.exp() if grpo.kl_unbiased else 1.0)
        values = values + grpo.kl_coef * kl
        metrics["loss/kl"] = (kl[learnt].sum(), learnt.sum())
    if grpo.entropy_coef:
        values = values - grpo.entropy_coef * entropy
    total = (weights * values).sum()
    return total, metrics | {
        "loss": (total, 0),
        "clip_fraction": (held.sum(), n),
        "update_kl": (k3(old_logprobs, logprobs.detach()).sum(), n),
        "moved": (moved.detach().abs().sum(), n),
    }


def token_weights(grpo: Grpo, lengths: Tensor, learnt: Tensor, minibatch: Tensor) -> Tensor:
    """What a token of each response weighs in the loss, lengths (E,) int64, learnt (E,) bool, minibatch (e,) int64 ->
    (E,) float32: 0 for those that are not in the minibatch or not learnt from."""
    responses, weights = len(minibatch), torch.zeros(len(lengths))
    own = learnt[minibatch].float()
    match grpo.mean_over:
        case "tokens":
            weights[minibatch] = own / (own * lengths[minibatch]).sum().clamp(min=1)
        case "responses":
            weights[minibatch] = own / (lengths[minibatch] * responses)
        case "length_free":
            weights[minibatch] = own / (grpo.generation.max_new * responses)
    return weights


class Algorithm(FromRewards):
    """GRPO's step and evaluation."""

    def __init__(self, recipe: Recipe, experience: Experience, ptx: Pretraining | None) -> None:
        self.recipe, self.grpo, self.experience, self.ptx = recipe, recipe.grpo, experience, ptx
        self.kl_coef = 0.0 if recipe.grpo.kl == "none" else recipe.grpo.kl_coef

    def learn(self, loop: Loop, chosen: np.ndarray, rate: float) -> Learnt:
        """One step of GRPO."""
        grpo, seed, step, started = self.grpo, self.recipe.seed, loop.step + 1, time.perf_counter()

        # 1. Sample a group of responses to each of the step's prompts, and score them.
        episodes, scores, metrics = self._sampled(loop, chosen, (seed, SAMPLING, step))
        # 2. Groups whose scores are all equal are sampled anew; those that stay so are kept or dropped.
        whole = grpo.advantage == "batch"  # then all responses of the step are one group
        drawn, equal = int(episodes.said.sum()), groups.equal(scores.view(1, -1) if whole else scores)  # (1,) or (N,)
        metrics["equal_groups"] = float(equal.float().mean())
        for attempt in range(grpo.resample if equal.any() else 0):
            again = equal.nonzero()[:, 0].numpy()
            anew, scores[again], _ = self._sampled(loop, chosen[again], (seed, ANEW, step, attempt))
            episodes, drawn, equal = episodes.replaced(again, anew), drawn + int(anew.said.sum()), groups.equal(scores)
            if not equal.any():
                break
        kept = self.experience.known(loop, scores) & (~equal[:, None] | (grpo.equal_groups == "keep"))  # (N, k)
        sampled_at = time.perf_counter()
        learnt = kept.flatten() & episodes.ended if grpo.unended == "mask" else kept.flatten()  # (N k,)
        metrics |= {"learnt_groups": float(learnt.view_as(kept).any(1).float().mean()), "learning_rate": rate}
        if not learnt.any():
            metrics |= {"updates": 0, **spent(started, sampled_at, sampled_at, drawn)}
            self.experience.watch.learnt(loop, step, metrics)
            return Learnt(metrics, 0, int(episodes.lengths.sum()))
        episodes, learnt = episodes.kept(kept.flatten()), learnt[kept.flatten()]  # from here on (E,)

        # 3. Actor and reference read them, in the rows of the first epoch.
        orders = [(seed, ORDER, step, epoch) for epoch in range(grpo.epochs)]
        epochs = [minibatches(len(episodes), grpo.minibatches, order) for order in orders]
        rollout = self.experience.read(loop, episodes, epochs[0], grpo.entropy or "known", grpo.kl != "none")
        # 4. Advantages of the responses, which are those of their tokens.
        metrics |= figures(rollout, self.kl_coef, float(scores[kept].mean()))
        if grpo.kl == "reward":
            penalty = k1(rollout.logprobs, rollout.ref_logprobs).sum(1)  # (E,); both are 0 where masked
            scores[kept] -= grpo.kl_coef * penalty
        advantages = ADVANTAGES[grpo.advantage](scores)[kept]  # (E,)
        scored_at = time.perf_counter()

        # 5. Epochs of minibatches.
        reference = (rollout.ref_logprobs,) if grpo.kl == "loss" else ()
        targets = Targets(rollout, loop.trunk.device, (rollout.logprobs, rollout.importance, *reference))

        def loss_of(numbers: np.ndarray, said: Said | None) -> Loss:
            weights = token_weights(grpo, rollout.lengths, learnt, torch.from_numpy(numbers))
            share = Share(advantages.to(loop.trunk.device), weights.to(loop.trunk.device))
            return partial(loss, grpo=grpo, targets=targets, share=share, said=said)

        def beside(number: int) -> list[Work]:
            place = (step - 1) * grpo.epochs * grpo.minibatches + number
            return self.ptx.work(loop, place) if self.ptx else []

        passes = in_epochs(loop, chosen, rate, rollout, episodes, epochs, loss_of, beside, grpo.stop_kl)
        metrics |= {**passes.metrics, **spent(started, sampled_at, scored_at, drawn)}
        self.experience.watch.learnt(loop, step, metrics)
        return Learnt(metrics, passes.distinct, int(episodes.lengths.sum()))

    def _sampled(
        self, loop: Loop, chosen: np.ndarray, key: tuple[int, ...]
    ) -> tuple[Episodes, Tensor, dict[str, float]]:
        """Responses to prompts, (N,) int64, their scores (N, k), and the means of these."""
        prompts, experience, grpo = loop.data.train, self.experience, self.grpo
        episodes = experience.sampled(loop, prompts, chosen, key, grpo.samples)
        parts = experience.parts(loop, prompts, chosen, episodes, [np.arange(len(chosen))])
        score = experience.score(parts, episodes)
        return episodes, score.view(len(chosen), -1), experience.figures(parts, score, episodes)

    def evaluate(self, loop: Loop) -> dict[str, Any]:
        """Scores of responses to the held-out prompts, and how far the actor has gone."""
        return self.experience.evaluated(loop, (self.recipe.seed, SAMPLING, 0), self.kl_coef)


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe, grpo = session.recipe, session.recipe.grpo
    others = {"ptx": grpo.ptx.reading(recipe.data)} if grpo.ptx else {}
    room = {"room": grpo.generation.max_new, "key": "grpo.generation.max_new"}
    if not (begun := session.begin(prompts(), others, **room, **stands_on(grpo.rewards, "grpo.rewards"))):
        return
    run, data, more = begun
    trunk = load_trunk(session)
    check_samples(trunk)
    rewards = Rewards(grpo.rewards, trunk, "grpo.rewards")
    temperature = grpo.generation.temperature
    roles = Roles(trunk, recipe.lora, rewards.scorers, None, temperature, recipe.seed, critic=False)
    ptx = Pretraining(grpo.ptx, more["ptx"], recipe.seed) if grpo.ptx else None
    experience = Experience(session, data, roles, rewards, grpo, "grpo")
    Loop(session, run, trunk, data, Algorithm(recipe, experience, ptx), roles).run_all()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.grpo", train, argv)


if __name__ == "__main__":
    main()
