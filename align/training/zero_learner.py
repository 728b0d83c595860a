"""What trains, where DeepSpeed holds the weights, gradients and moments."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from align.training import zero
from align.training.learner import Learner
from align.training.runs.checkpoint import Tensors, copied
from align.training.runs.state import adamw, trained_parameters


class ZeroLearner(Learner):
    """A run takes up its state as without DeepSpeed, on whole tensors; then its engine gets them."""

    def wrapped(self) -> nn.Module:
        """The module alone, until there is a state to go on from."""
        return self.module

    def begin(self) -> None:
        """Hand weights and moments over."""
        before, self.stage = self.optimizer.state, zero.stage_of(self.accelerator)
        by_name = {name: before[p] for name, p in self.named.items() if p in before}
        optimizer = adamw(self.module, self.session.recipe.optim, {})
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

    def row(self, last: bool) -> nullcontext:
        """Around a row's forward and backward pass."""
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, total: Tensor) -> None:
        """Add a row's gradient."""
        self.model.backward(total, scale_wrt_gas=False)

    def clipped(self, rate: float, count: float) -> dict[str, float]:
        """The norm of the mean's gradient. Its loss scale, by which it divides gradients, makes them those of ours."""
        self.scale = max(count, 1.0) / self.accelerator.num_processes
        for group in self.model.optimizer.param_groups:
            group["lr"] = rate
        return {"grad_norm": zero.norm_of(self.model) / self.scale}

    def step(self) -> None:
        """Change the weights; DeepSpeed clips."""
        outer = self.model.optimizer
        outer.override_loss_scale(self.scale)
        self.model.step()
        outer.override_loss_scale(1.0)
        if self.stage == 3:
            zero.hold_outside(self.trunk)

    def captured(self) -> Tensors:
        """What a checkpoint holds."""
        model = self._kept((name, copied(zero.full(p))) for name, p in self.named.items())
        moments = ((name, copied(moment)) for name, moment in zero.moments(self.named, self.model))
        return {"model": model, "optimizer": self._kept(moments)}

    def result(self) -> dict[str, Tensor]:
        """What a result holds."""
        found = self._kept((name, zero.full(p)) for name, p in self.module.saved().items())
        return {name: tensor.detach().to("cpu") for name, tensor in found.items()}

    def _kept(self, tensors: Any) -> dict[str, Tensor]:
        """One after another; only the first process keeps them."""
        found = {}
        for name, tensor in tensors:
            if self.session.first:
                found[name] = tensor
        return found
