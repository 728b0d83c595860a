"""What trains, where the trunk lies over the processes.

What a LoRA trains, and heads, are whole on every process, and so are their averaged gradients. AdamW's moments are not:
each parameter belongs to one process, which alone keeps its moments and changes it, and then sends it to the others
(ZeRO stage 1; Rajbhandari et al. 2020, arXiv 1910.02054). AdamW works number by number, so the weights are to the bit
those of a process that steps them all. With `lora: null` weights, gradients and moments are shards already.

torch's `ZeroRedundancyOptimizer` does the same. It is not used: its state goes to a checkpoint as one pickle, by way of
every process, and is put back by place where ours goes by name; and it is marked as experimental.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from align.training.batches import Batches
from align.training.learner import Learner, Work
from align.training.meters import Sums
from align.training.runs.checkpoint import Tensors
from align.training.runs.state import MOMENTS, make_moments
from align.training.shards import agreed, average_gradients, together


class ShardLearner(Learner):
    """The base is sharded (`shards.py`); of what is whole, each process steps its part."""

    def wrapped(self) -> nn.Module:
        """The module; what is whole begins as it is in the first process."""
        return agreed(self.module)

    def begin(self) -> None:
        """Of the moments that a run goes on from, keep this process's part."""
        whole = [p for p in self.named.values() if not isinstance(p, DTensor)]
        self.parts = shared_out(whole, self.accelerator.num_processes)
        self.owner = {p: process for process, part in enumerate(self.parts) for p in part}
        for p in self._others():
            self.optimizer.state.pop(p, None)
        make_moments(self.optimizer, self.parts[self.accelerator.process_index])

    def gradients(self, batches: Batches, work: Sequence[Work]) -> Sums:
        """Accumulate the gradient of this process's rows; of what is whole, the mean over all processes."""
        sums = super().gradients(batches, work)
        average_gradients(self.named.values(), self.accelerator)
        return sums

    def step(self) -> None:
        """Change this process's part of what is whole, and get the others' parts from them."""
        for p in self._others():
            p.grad = None  # AdamW passes over it and makes no moments
        super().step()
        for process, part in enumerate(self.parts):
            together([p.data for p in part], lambda flat, process=process: distributed.broadcast(flat, process))

    def captured(self) -> Tensors:
        """What a checkpoint holds; the first process gets the others' moments from them, one after another."""
        found, own = super().captured(), self.accelerator.process_index
        for name, p in self.named.items():
            there = self.owner.get(p, 0)
            if there == 0 or own not in (0, there):
                continue
            for key in MOMENTS:
                if own == there:
                    distributed.send(self.optimizer.state[p][key].contiguous(), 0)
                else:
                    moment = torch.empty(() if key == "step" else p.shape, device=p.device)
                    distributed.recv(moment, there)
                    found["optimizer"][f"{name}/{key}"] = moment.cpu()
        return found

    def _others(self) -> Iterator[nn.Parameter]:
        """What other processes step."""
        return (p for p, process in self.owner.items() if process != self.accelerator.process_index)


def shared_out(parameters: Iterable[nn.Parameter], processes: int) -> list[list[nn.Parameter]]:
    """A part for each process, the same in all of them: the largest first, each to where the fewest numbers are."""
    parts: list[list[nn.Parameter]] = [[] for _ in range(processes)]
    sizes = [0] * processes
    for p in sorted(parameters, key=torch.Tensor.numel, reverse=True):
        least = sizes.index(min(sizes))
        parts[least].append(p)
        sizes[least] += p.numel()
    return parts
