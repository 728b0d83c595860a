"""Averages of adapters on one trunk, by peft's own.

`linear`: the weighted sum of what the adapters add, exactly (peft's `cat`; its `linear` averages both factors of a
LoRA apart from each other, which is another thing). `ties`: Yadav et al. 2023, arXiv 2306.01708. `dare_linear`,
`dare_ties`: Yu et al. 2023, arXiv 2311.03099, whose choice of what is dropped follows the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from peft import PeftModel

from align.recipe.errors import UserError

Kind = Literal["linear", "ties", "dare_linear", "dare_ties"]
KINDS = get_args(Kind)
NAME = "average"


class Average(NamedTuple):
    """How several adapters become one."""

    kind: Kind
    weights: tuple[float, ...]
    density: float  # share of values that TIES and DARE keep
    seed: int

    def act(self, model: PeftModel, adapters: Sequence[str]) -> None:
        """Make the average of a model's adapters, and let it act in their place."""
        ranks = {model.peft_config[name].r for name in adapters}
        if self.kind != "linear" and len(ranks) > 1:
            told = ", ".join(map(str, sorted(ranks)))
            raise UserError(f"merge: --average {self.kind} needs adapters of one rank, and these have {told}")
        how = "cat" if self.kind == "linear" else self.kind
        density = None if self.kind == "linear" else self.density
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model.add_weighted_adapter([*adapters], [*self.weights], NAME, how, density=density)
        model.set_adapter(NAME)
        model.eval()

    def __str__(self) -> str:
        shares = ", ".join(f"{weight:g}" for weight in self.weights)
        kept = "" if self.kind == "linear" else f", density {self.density:g}, seed {self.seed}"
        return f"{self.kind}, weights {shares}{kept}"
