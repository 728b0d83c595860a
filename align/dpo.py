"""Direct preference optimisation: raise the chosen answer over the rejected one, held by a reference.

    accelerate launch -q -m align.dpo recipes/dpo.yaml

For a prompt x with a chosen answer c and a rejected one r, h = log p(c|x)/ref(c|x) - log p(r|x)/ref(r|x), and the loss
is the mean over the step's pairs of

    -log sigmoid(beta * h)

(Rafailov et al. 2023, arXiv 2305.18290), or one of its variants: see `dpo.loss`. The reference is the trunk with its
adapter off, so policy and reference are equal at the start; with `lora: null` it is a frozen copy, or only its numbers
are kept. Prompt and answers are one token tree, so the prompt is computed once. Left out on purpose: a reference that
moves, and losses on prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.templates.preferences import labelled, preferences
from align.data.trees import Forest
from align.models.trunk import Trunk
from align.objectives import losses
from align.objectives.losses import path_counts, path_sums, preference_pairs
from align.recipe.schema import BaseRecipe, Section
from align.training.answers.section import AnsweringTrain
from align.training.launch import run_stage
from align.training.learner import Metrics
from align.training.loop import Loop
from align.training.meters import Sums, buckets, interval, wins
from align.training.reference import KnownReference, Mismatched, Reference, with_known_reference
from align.training.session import Session
from align.training.shards import held, load_trunk
from align.training.supervised import fit

MARGINS = [-2.0, -1.5, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 1.5, 2.0]  # edges of the histogram
WITHOUT_REFERENCE = ("simpo", "orpo")


class Dpo(Section):
    """What is preferred, how strongly, and against what."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto"] = "sigmoid"
    """`sigmoid` (DPO), `robust` (arXiv 2403.00409), `ipo` (arXiv 2310.12036), `hinge` (SLiC, arXiv 2305.10425); without
    a reference `simpo` (arXiv 2405.14734), `orpo` (arXiv 2403.07691); on labelled answers `kto` (arXiv 2402.01306)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference; in `orpo` the weight of the odds ratio."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round; of `sigmoid` and `robust`."""
    length_normalized: bool = False
    """Take log-ratios per token of the answer instead of over the whole of it. `ipo` as TRL has it."""
    gamma: Annotated[float, Field(ge=0)] = 0.5
    """Margin of `simpo`."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of desirable answers in `kto`."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of undesirable answers in `kto`."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's negative log-likelihood per token, added to the loss (as RPO, arXiv 2404.19733)."""
    pairs: Literal["all", "adjacent"] = "all"
    """Of a ranked list: every pair of answers, or each answer with the next."""
    reference: Literal["same_pass", "cached"] = "same_pass"
    """Compute the reference's log-probabilities batch by batch, or once ahead of time, kept on disk for later runs on
    the same trunk and tokens."""


class Recipe(BaseRecipe):
    """A policy from preferences, without a reward model."""

    stage: Literal["dpo"]
    """This stage."""
    train: AnsweringTrain = Field(default_factory=AnsweringTrain)
    dpo: Dpo = Field(default_factory=Dpo)

    @model_validator(mode="after")
    def _loss_fits(self) -> Recipe:
        dpo = self.dpo
        if dpo.label_smoothing and dpo.loss not in ("sigmoid", "robust"):
            raise ValueError(f"`dpo.label_smoothing` belongs to the losses sigmoid and robust, not to {dpo.loss}")
        if dpo.reference == "cached" and dpo.loss in (*WITHOUT_REFERENCE, "kto"):
            why = "compares mismatched answers too" if dpo.loss == "kto" else "has no reference"
            raise ValueError(f"`dpo.reference: cached` is not for the loss {dpo.loss}, which {why}; leave it out")
        if dpo.loss == "kto" and self.batch.examples < 2:
            raise ValueError("`batch.examples`: kto takes its baseline from a step's other answers; give it 2 or more")
        if dpo.sft_weight and dpo.loss in ("orpo", "kto"):
            raise ValueError(f"`dpo.sft_weight` is not for the loss {dpo.loss}; leave it out")
        if self.lora and self.lora.dropout and dpo.loss == "kto":
            raise ValueError("`lora.dropout` makes the baseline of kto random; set it to 0")
        return self


def loss(trunk: nn.Module, batch: Forest, dpo: Dpo, reference: Reference) -> tuple[Tensor, Metrics]:
    """Sum of the pairs' losses, and what policy and reference say of them."""
    logprobs = path_sums(trunk(batch), batch.path, batch.paths)  # (P,)
    tokens = path_counts(batch.path, batch.paths).clamp(min=1)
    per_token = logprobs / tokens
    better, worse = preference_pairs(batch.owner, dpo.pairs == "adjacent")  # (m,), indices of paths
    if dpo.loss in WITHOUT_REFERENCE:
        chosen, rejected = per_token[better], per_token[worse]
        values = (
            losses.simpo(chosen, rejected, dpo.beta, dpo.gamma)
            if dpo.loss == "simpo"
            else losses.orpo(chosen, rejected, dpo.beta)
        )
    else:
        log_ratios = logprobs - reference(batch)  # (P,)
        chosen, rejected = (log_ratios / tokens if dpo.length_normalized else log_ratios)[torch.stack([better, worse])]
        h = chosen - rejected
        match dpo.loss:
            case "sigmoid":
                values = losses.sigmoid(h, dpo.beta, dpo.label_smoothing)
            case "robust":
                values = losses.robust(h, dpo.beta, dpo.label_smoothing)
            case "ipo":
                values = losses.ipo(h, dpo.beta)
            case "hinge":
                values = losses.hinge(h, dpo.beta)
    values = values - dpo.sft_weight * per_token[better]
    pairs = len(values)
    rewards = dpo.beta * torch.stack([chosen, rejected]).detach()
    metrics = {
        "loss": (values.sum(), pairs),
        "accuracy": (wins(rewards[0], rewards[1]).sum(), pairs),
        "rewards/chosen": (rewards[0].sum(), pairs),
        "rewards/rejected": (rewards[1].sum(), pairs),
        "margin": ((rewards[0] - rewards[1]).sum(), pairs),
        "logprobs/chosen": (logprobs[better].sum(), pairs),
        "logprobs/rejected": (logprobs[worse].sum(), pairs),
        "nll_per_token/chosen": (-logprobs[better].sum(), tokens[better].sum()),
        "nll_per_token/rejected": (-logprobs[worse].sum(), tokens[worse].sum()),
    }
    if not torch.is_grad_enabled():  # an evaluation
        metrics["margin_share"] = (buckets(rewards[0] - rewards[1], MARGINS).sum(0), pairs)
        if dpo.loss not in WITHOUT_REFERENCE:
            metrics |= reference.divergence(batch)
    return values.sum(), metrics


def kto_loss(trunk: nn.Module, batch: Forest, dpo: Dpo, reference: Reference) -> tuple[Tensor, Metrics]:
    """The same for labelled answers; `reference.baseline` is z0 of the whole step."""
    logprobs = path_sums(trunk(batch), batch.path, batch.paths)  # (P,)
    tokens = path_counts(batch.path, batch.paths).clamp(min=1)
    log_ratios = logprobs - reference(batch)
    h = log_ratios / tokens if dpo.length_normalized else log_ratios
    good = batch.targets > 0.5
    values = losses.kto(h, good, reference.baseline, dpo.beta, dpo.desirable_weight, dpo.undesirable_weight)
    rewards = dpo.beta * h.detach()
    metrics = {
        "loss": (values.sum(), len(values)),
        "rewards/desirable": (rewards[good].sum(), good.sum()),
        "rewards/undesirable": (rewards[~good].sum(), (~good).sum()),
        "nll_per_token/desirable": (-logprobs[good].sum(), tokens[good].sum()),
        "nll_per_token/undesirable": (-logprobs[~good].sum(), tokens[~good].sum()),
        "kl_baseline": (reference.baseline * len(values), len(values)),
    }
    if not torch.is_grad_enabled():
        metrics |= reference.divergence(batch)
    return values.sum(), metrics


def baseline(loop: Loop, examples: Examples, chosen: np.ndarray, reference: Reference) -> None:
    """z0 of KTO for a step: the mean log-ratio of answers put to the next example's prompt, at least 0.

    Over all examples of the step, so that neither rows nor processes change it.
    """

    def log_ratios(trunk: Trunk, forest: Forest) -> Tensor:
        return path_sums(trunk(forest), forest.path, forest.paths) - reference(forest)

    if len(chosen) < 2:  # there is no other answer
        reference.baseline = 0.0
        return
    others = Mismatched(examples, chosen)
    ratios = torch.cat(loop.each(others, np.arange(len(others)), log_ratios, "baseline"))
    reference.baseline = max(float(ratios.mean()), 0.0)


def derive(sums: Sums) -> dict[str, float | list[float]]:
    """The 95 % interval of the accuracy, and the edges between the bins of `margin_share`."""
    low, high = interval(*sums.sums()["accuracy"])
    return {"accuracy_low": low, "accuracy_high": high, "margin_edges": MARGINS}


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe = session.recipe
    unpaired = recipe.dpo.loss == "kto"
    weights = recipe.dpo.desirable_weight, recipe.dpo.undesirable_weight
    begun = session.begin(labelled(*weights) if unpaired else preferences())
    if begun is None:
        return
    run, data, _ = begun
    trunk = load_trunk(session)
    if recipe.dpo.reference == "cached":
        data, reference = with_known_reference(session, trunk, data), KnownReference()
    else:
        reference = Reference(trunk, _frozen_copy(session) if needs_copy(recipe) else None)
    hooks = {"before": partial(baseline, reference=reference)} if unpaired else {"derive": derive}
    step = partial(kto_loss if unpaired else loss, dpo=recipe.dpo, reference=reference)
    fit(session, run, trunk, data, step, **hooks)


def needs_copy(recipe: Recipe) -> bool:
    """Whether the reference is a second model: where the trunk itself is trained."""
    return recipe.lora is None and recipe.dpo.loss not in WITHOUT_REFERENCE


def _frozen_copy(session: Session) -> Trunk:
    """The start, held exactly as the policy is held, so that both give the same numbers."""
    return held(session, session.recipe.model, None, frozen=False).requires_grad_(False).eval()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.dpo", train, argv)


if __name__ == "__main__":
    main()
