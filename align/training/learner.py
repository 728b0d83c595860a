"""What trains, and how it changes: weights, gradients and the optimizer, on one process or several.

Under DDP every process holds all weights, and gradients are averaged after a step's last row. With
`train.shard: layers` the base lies over the processes, and so do AdamW's moments (`shard_learner.py`). Under DeepSpeed
its engine does both (`zero_learner.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from align.data.trees import Forest
from align.models.trunk import Trunk
from align.training.batches import Batches, Planted
from align.training.meters import Sums
from align.training.runs.checkpoint import Tensors
from align.training.runs.state import adamw, capture, gathered, make_moments, trained_parameters, whole
from align.training.session import Session
from align.training.shards import let_go

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]  # name -> (sum, count), or vectors of them
Loss = Callable[[nn.Module, Forest], tuple[Tensor, Metrics]]  # (model, batch) -> (summed loss, metrics with "loss")
Work = tuple[Planted, list[int], Loss]  # a row of examples and what is to be learnt of it


class Learner:
    """The weights of a run."""

    def __init__(self, session: Session, trunk: Trunk, module: nn.Module, rates: dict[str, float]) -> None:
        self.session, self.accelerator, self.trunk, self.module = session, session.accelerator, trunk, module
        self.most = session.recipe.optim.max_grad_norm or math.inf
        let_go(trunk)
        self.optimizer = adamw(module, session.recipe.optim, rates)
        self.model = self.wrapped()  # computes a loss
        self.named = trained_parameters(self.model)
        self.model.train()

    def wrapped(self) -> nn.Module:
        """The module, under DDP on several processes."""
        return self.accelerator.prepare(self.module)

    def begin(self) -> None:
        """The state to go on from is there."""
        make_moments(self.optimizer, self.named.values())

    def row(self, last: bool) -> AbstractContextManager:
        """Around a row's forward and backward pass; gradients go from process to process after the last."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, total: Tensor) -> None:
        """Add a row's gradient."""
        self.accelerator.backward(total)

    def gradients(self, batches: Batches, work: Sequence[Work]) -> Sums:
        """Accumulate the gradient of this process's rows; metrics over all processes, `distinct` tokens among them."""
        sums = Sums()
        for number, (examples, row, loss) in enumerate(work, 1):
            with self.row(last=number == len(work)):
                batch = batches.plant(examples, row)
                total, metrics = loss(self.model, batch)
                # A process without examples in this row computes along, and adds nothing.
                self.backward(total if row else total * 0.0)
            sums.add("distinct", batch.distinct if row else 0)
            for name, (value, count) in metrics.items() if row else ():
                sums.add(name, value, count)
        return sums.merged(self.accelerator)

    def clipped(self, rate: float, count: float) -> dict[str, float]:
        """Make the accumulated gradients those of a mean over `count`, and clip them; their norms before, by group."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        # Gradients are averaged over processes; the loss is a sum over all of them.
        torch._foreach_mul_(gradients, self.accelerator.num_processes / max(count, 1.0))
        groups: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
            groups.setdefault(group["name"], []).extend(group["params"])
        norms = {name: self.accelerator.clip_grad_norm_(params, self.most) for name, params in groups.items()}
        return {f"grad_norm/{name}" if name else "grad_norm": float(whole(norm)) for name, norm in norms.items()}

    def step(self) -> None:
        """Change the weights by what `clipped` left."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """The accumulated gradients."""
        self.optimizer.zero_grad()

    def captured(self) -> Tensors:
        """What a checkpoint holds, in the first process; every process must call it."""
        return capture(self.named, self.optimizer, self.session.first)

    def result(self) -> dict[str, Tensor]:
        """What a result holds, in the first process, on the CPU; every process must call it."""
        found = gathered(self.module.saved(), self.session.first)
        return {name: tensor.detach().to("cpu") for name, tensor in found.items()}
