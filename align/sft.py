"""Supervised fine-tuning: raise the likelihood of the assistant's turns (or of plain text), token by token.

    accelerate launch -q -m align.sft recipes/chat.yaml

For a conversation x and its assistant tokens A, the loss is the mean over all A of the step's examples of

    -log p(x_t | x_<t),  t in A

with a LoRA on a frozen trunk (arXiv 2106.09685), or all weights with `lora: null`. Left out on purpose: loss on the
user's turns (choose `sft.loss_on: all`), noise on embeddings, and any weighting of examples by their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from align.data.templates.chats import chat_of
from align.data.templates.render import conversations
from align.data.trees import Forest
from align.recipe.schema import BaseRecipe, Section
from align.training.answers.section import AnsweringTrain
from align.training.launch import run_stage
from align.training.learner import Metrics
from align.training.meters import perplexity
from align.training.session import Session
from align.training.shards import load_trunk
from align.training.supervised import fit


class Sft(Section):
    """What of each example is learned."""

    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Every assistant turn, only the last one, or every token. Plain text is always learned whole."""
    empty_thoughts: bool = False
    """Train the empty thought that the templates of some reasoning models write before an answer without one. Otherwise
    it is context."""


class Recipe(BaseRecipe):
    """Supervised fine-tuning on conversations or text."""

    stage: Literal["sft"]
    """This stage."""
    train: AnsweringTrain = Field(default_factory=AnsweringTrain)
    sft: Sft = Field(default_factory=Sft)


def loss(trunk: nn.Module, batch: Forest) -> tuple[Tensor, Metrics]:
    """Sum of negative log-likelihoods in nats over the batch's labels, and their mean as a metric."""
    nll = -trunk(batch).sum()
    return nll, {"loss": (nll, len(batch.labels))}


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe = session.recipe
    begun = session.begin(conversations(recipe.sft.loss_on, recipe.sft.empty_thoughts))
    if begun is None:
        return
    run, data, _ = begun
    trunk = load_trunk(session)
    if chat_of(trunk.tokenizer).own_thought and not recipe.sft.empty_thoughts:
        session.say(
            "the chat template writes an empty thought before an answer that has none: it is context, not learnt "
            "(sft.empty_thoughts=true learns it)"
        )
    fit(session, run, trunk, data, loss, derive=lambda sums: {"perplexity": perplexity(*sums.sums()["loss"])})


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.sft", train, argv)


if __name__ == "__main__":
    main()
