"""Reward modelling: a score for a whole answer, such that of two answers the better one scores higher.

    accelerate launch -q -m align.reward recipes/reward.yaml

For a prompt x with a chosen answer c and a rejected one r, the loss is the mean over the step's pairs of

    -log sigmoid(s(x, c) - s(x, r) - margin) + centring * (s(x, c) + s(x, r))^2

(Bradley & Terry 1952, as in Ouyang et al. 2022, arXiv 2203.02155; the margin of Llama 2, arXiv 2307.09288; centring of
Eisenstein et al. 2023, arXiv 2312.09244). s is a linear head on the hidden state of an answer's last token, its end of
turn. Prompt and answers are one token tree, so the prompt is computed once. When training is done, mean and spread of
the score on demonstrations are saved with it, for PPO to normalise by. Left out on purpose: ensembles, and process
rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.templates.preferences import demonstrations, preferences
from align.data.trees import Forest
from align.objectives.losses import bradley_terry, centring, preference_pairs
from align.recipe.schema import BaseRecipe, Eval, Section, Source
from align.training.launch import run_stage
from align.training.learner import Metrics
from align.training.loop import Loop
from align.training.meters import Sums, buckets, interval, wins
from align.training.session import Session
from align.training.shards import load_trunk
from align.training.supervised import fit

MARGINS = [-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]  # edges of the histogram
CONFIDENCES = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]  # edges of the calibration's bins


class Reward(Section):
    """What the scores learn."""

    pairs: Literal["all", "adjacent"] = "all"
    """Of a ranked list: every pair of answers, or each answer with the next."""
    margin: bool = True
    """Ask for at least the row's `margin`, where rows have one."""
    centring: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's scores, which keeps them around 0; 0.01 is usual, 0 leaves it out."""
    demonstrations: list[Source] = Field(default_factory=list)
    """Conversations whose last answers' scores give the mean and spread that PPO normalises by. Default: the best
    answers of the training rows."""
    demonstration_rows: Annotated[int, Field(gt=1)] = 512
    """At most so many of them, a seeded choice."""


class Recipe(BaseRecipe):
    """A reward model from preferences."""

    stage: Literal["reward"]
    """This stage."""
    reward: Reward = Field(default_factory=Reward)

    @model_validator(mode="after")
    def _answers_nothing(self) -> Recipe:
        if self.log.samples:
            raise ValueError("`log.samples`: a reward model scores answers and writes none; drop the prompts")
        return self


def loss(trunk: nn.Module, batch: Forest, reward: Reward) -> tuple[Tensor, Metrics]:
    """Sum of the pairs' losses in nats, and what the scores say of the pairs."""
    scores = trunk(batch)[:, 0]  # (P,)
    better, worse = preference_pairs(batch.owner, reward.pairs == "adjacent")
    chosen, rejected = scores[better], scores[worse]  # (m,)
    margin = batch.targets[better] - batch.targets[worse] if reward.margin else 0.0
    losses = bradley_terry(chosen, rejected, margin) + reward.centring * centring(chosen, rejected)
    pairs, ahead = len(losses), (chosen - rejected).detach()
    right, sure = wins(chosen, rejected), torch.sigmoid(ahead.abs())
    spread = buckets(ahead, MARGINS)
    bins = buckets(sure, CONFIDENCES[1:])
    metrics = {
        "loss": (losses.sum(), pairs),
        "accuracy": (right.sum(), pairs),
        "margin": (ahead.sum(), pairs),
        "score/chosen": (chosen.sum(), pairs),
        "score/rejected": (rejected.sum(), pairs),
    }
    if not torch.is_grad_enabled():  # an evaluation
        metrics |= {
            "margin_share": (spread.sum(0), pairs),
            "calibration_confidence": ((bins * sure[:, None]).sum(0), bins.sum(0)),
            "calibration_accuracy": ((bins * right[:, None]).sum(0), bins.sum(0)),
        }
    return losses.sum(), metrics


def derive(sums: Sums) -> dict[str, float | list[float]]:
    """The 95 % interval of the accuracy, and the edges between the bins of `margin_share`."""
    low, high = interval(*sums.sums()["accuracy"])
    return {"accuracy_low": low, "accuracy_high": high, "margin_edges": MARGINS}


def normalisation(loop: Loop, last: bool, examples: Examples) -> dict[str, Any]:
    """Mean and spread of the score on demonstrations."""
    recipe = loop.recipe
    chosen = examples.order(recipe.seed, 0)[: recipe.reward.demonstration_rows]
    lines = loop.each(examples, chosen, lambda trunk, forest: trunk(forest), "scoring demonstrations")
    best = torch.stack([scores[0, 0] for scores in lines]).double()  # a tree's first path is its best answer
    spread = float(best.std()) if len(best) > 1 else 0.0
    return {"score_mean": float(best.mean()), "score_std": spread, "score_rows": len(best)}


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe, others = session.recipe, {}
    if sources := recipe.reward.demonstrations:
        section = recipe.data.model_copy(update={"train": sources, "eval": Eval()})
        others = {"demonstrations": (demonstrations(), section)}
    begun = session.begin(preferences(), others)
    if begun is None:
        return
    run, data, more = begun
    trunk = load_trunk(session, outputs=1)
    described = partial(normalisation, examples=more.get("demonstrations", data.train))
    fit(session, run, trunk, data, partial(loss, reward=recipe.reward), derive=derive, described=described)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.reward", train, argv)


if __name__ == "__main__":
    main()
