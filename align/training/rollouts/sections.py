"""What the recipes of PPO and GRPO have in common: rewards, how responses are drawn, and what is watched."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from align.models.roles import Entropy
from align.recipe.schema import BaseRecipe, PositiveInt, Section
from align.recipe.train import Best
from align.training.answers.section import AnsweringTrain
from align.training.rollouts.engine import Drawing
from align.training.rollouts.parts import RewardPart
from align.training.rollouts.pretraining import Ptx


class RewardedTrain(AnsweringTrain):
    """How long, and how often to look and to save."""

    best: Best | None = Best(metric="score", goal="greatest")
    """Keep the weights with the best evaluation in `best/`, which loads as `final/` does. The evaluation before the
    first step does not count. Default: that with the greatest score."""


class Rewarded(Section):
    """Learning from rewards of responses that are sampled."""

    rewards: list[RewardPart] = Field(min_length=1)
    """The parts of the reward: their weighted sum is the score."""
    generation: Drawing = Field(default_factory=Drawing)
    """How responses are drawn."""
    minibatches: PositiveInt = 1
    """Optimizer steps in one pass over a step's responses."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the actor's entropy, which is added to what it maximises."""
    stop_kl: Annotated[float | None, Field(gt=0)] = None
    """Break off a step's epochs when KL(p_old, p) per token is more than this. Default: never."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the score of a response that did not end."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the score for every token."""
    ptx: Ptx | None = None
    """Language modelling beside it, against forgetting. Default: none."""
    eval_samples: PositiveInt = 1
    """Responses to each held-out prompt in an evaluation, drawn from the same random numbers each time."""
    kl_budget: Annotated[float | None, Field(gt=0)] = None
    """`best/` keeps the best actor (`train.best`) whose KL is at most this. Default: whatever its KL."""

    def affords(self, kl: float) -> bool:
        """Whether an actor that has gone so far is within the budget."""
        return self.kl_budget is None or kl <= self.kl_budget

    @property
    def entropy(self) -> Entropy | None:
        """What the loss needs to know of it."""
        return "learnt" if self.entropy_coef else None

    def penalty(self, lengths: Tensor, ended: Tensor) -> Tensor:
        """What is taken off the score of responses of so many tokens, (E,) int64, of which some ended, (E,) bool."""
        return self.missing_eos_penalty * ~ended + self.length_penalty * lengths


def check_rewarded(recipe: BaseRecipe, section: Rewarded, name: str) -> None:
    """ValueError for what does not go with sampling and rewards; `name`: the stage's section."""
    check_sampling(recipe)
    if not any(part.weight for part in section.rewards):
        raise ValueError(f"`{name}.rewards`: every part has weight 0; a judge alone rewards nothing")
    if section.minibatches > recipe.batch.examples:
        raise ValueError(f"`{name}.minibatches`: there are more than prompts in a step (batch.examples)")


def check_sampling(recipe: BaseRecipe) -> None:
    """ValueError for what does not go with roles on one trunk that learn from what they sampled."""
    if recipe.lora is None:
        raise ValueError("`lora: null`: the stage's roles are adapters on one trunk; give a `lora` section")
    if recipe.lora.dropout:
        raise ValueError("`lora.dropout` makes p/p_old random; set it to 0")
    if recipe.model.add_tokens:
        raise ValueError(
            "`model.add_tokens`: the stage's roles share the embedding; train the tokens' rows in SFT first"
        )
    if recipe.data.overlong == "truncate":
        raise ValueError("`data.overlong: truncate`: a prompt without its end asks something else; drop it")
