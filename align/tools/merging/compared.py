"""Two models on the same texts: how far their logits lie apart.

Shapes: l tokens of a probe, V vocabulary (of a scoring result: its outputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from align.data.templates.control import encoded_text
from align.recipe.errors import UserError

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is 12 times 12?\nAnswer: 144.",
    "Die Würde des Menschen ist unantastbar. 人生の意味は何ですか。",
    "def add(a, b):\n    return a + b\n",
)
LONGEST = 48  # tokens of a probe
DRAWN = 2  # probes of any tokens, those that were added among them
# Of the largest logit where that is above 1; float32 itself has noise of some 1e-6 of it (docs/merge.md).
TOLERANCE = 1e-4


class Difference(NamedTuple):
    """How far a model lies from another."""

    largest: float  # of all differences of logits
    scale: float  # the largest logit
    kl: float  # mean over positions of KL(one || other) in nats; of outputs without a distribution 0
    changed: float  # share of positions whose likeliest token is another

    def check(self, told: str) -> None:
        """UserError, which begins with `told`, where it is more than rounding."""
        if not self.largest <= TOLERANCE * max(1.0, self.scale):  # nan is more, too
            raise UserError(
                f"{told} (logits differ by {self.largest:.3g}, where the largest is {self.scale:.3g}); nothing was "
                "written. Please report it with the base's name"
            )

    def __str__(self) -> str:
        return f"logits differ by {self.largest:.2g} at most (largest logit {self.scale:.3g}, KL {self.kl:.2g} nats)"


def probes(tokenizer: Tokenizer, rows: int) -> list[Tensor]:
    """Token ids (1, l) int64 of texts, and of tokens drawn from all that have one of the `rows` of embeddings."""
    chosen = [torch.tensor(ids[:LONGEST].tolist()) for ids in encoded_text(list(TEXTS), tokenizer) if len(ids)]
    draw = torch.Generator().manual_seed(0)
    most = min(rows, len(tokenizer))
    drawn = torch.randint(most, (DRAWN, LONGEST), generator=draw)
    drawn[0, : min(8, most)] = torch.arange(most)[-8:]  # added tokens stand at the end
    return [ids.long()[None] for ids in (*chosen, *drawn) if int(ids.max()) < rows]


@torch.no_grad()
def logits_of(model: nn.Module, given: Sequence[Tensor]) -> list[Tensor]:
    """(l, V) float32 for each probe; (1, outputs) of a scoring model."""
    return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() for ids in given]


def difference(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Difference:
    """Of two models' logits for the same probes."""
    one, other = (torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (ones, others))
    logp, logq = one.log_softmax(-1), other.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    changed = (one.argmax(-1) != other.argmax(-1)).float().mean()
    return Difference(float((one - other).abs().max()), float(one.abs().max()), float(kl.clamp(min=0)), float(changed))
