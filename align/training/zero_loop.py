"""The training loop where DeepSpeed holds the weights, gradients and moments that train."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from align.training import zero
from align.training.loop import Loop
from align.training.runs.checkpoint import Tensors
from align.training.runs.state import adamw, trained_parameters


class ZeroLoop(Loop):
    """A run takes up its state as without DeepSpeed, on whole tensors; then its engine gets them."""

    def _wrapped(self) -> nn.Module:
        return self.module

    def _begin(self) -> None:
        super()._begin()
        before, self.stage = self.optimizer.state, zero.stage_of(self.accelerator)
        by_name = {name: before[p] for name, p in self.named.items() if p in before}
        optimizer = adamw(self.module, self.recipe.optim, {})
        self.model, _ = self.accelerator.prepare(self.module, optimizer)
        self.named = trained_parameters(self.model)
        if self.stage == 3:
            zero.hold_outside(self.trunk)
            self.trunk.whole = partial(zero.whole, self.trunk, self.model)
        zero.put_moments({self.named[name]: state for name, state in by_name.items()}, self.model)
        self.optimizer = optimizer
        self.session.say(
            f"DeepSpeed ZeRO-{self.stage}: losses, checkpoints and results are as without it"
            + ("; each process loads the whole base before its weights are laid out" if self.stage == 3 else "")
        )

    def _row(self, last: bool) -> nullcontext:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _backward(self, total: Tensor) -> None:
        self.model.backward(total, scale_wrt_gas=False)

    def update(self, chosen: np.ndarray, rate: float, loss: float, count: float) -> dict[str, float]:
        """As without DeepSpeed; its loss scale, which it divides gradients by, is what turns their mean into ours."""
        outer, scale = self.model.optimizer, max(count, 1.0) / self.accelerator.num_processes
        for group in outer.param_groups:
            group["lr"] = rate
        norm = zero.norm_of(self.model) / scale
        self._guard(loss, norm, chosen)
        outer.override_loss_scale(scale)
        self.model.step()
        outer.override_loss_scale(1.0)
        if self.stage == 3:
            zero.hold_outside(self.trunk)
        return {"grad_norm": norm}

    def _captured(self) -> Tensors:
        model = self._kept((name, zero.full(p)) for name, p in self.named.items())
        return {"model": model, "optimizer": self._kept(zero.moments(self.named, self.model))}

    def _result(self) -> dict[str, Tensor]:
        return self._kept((name, zero.full(p)) for name, p in self.module.saved().items())

    def _kept(self, tensors: Any) -> dict[str, Tensor]:
        """One after another; only the first process keeps them."""
        found = {}
        for name, tensor in tensors:
            if self.session.first:
                found[name] = tensor
        return found
