"""A step that is the same work at the same places every time: recorded once, then replayed without Python.

While responses are sampled, a step of a small model is a few hundred short kernels, and starting them takes longer than
they do. On a GPU they become one CUDA graph (https://docs.nvidia.com/cuda/cuda-programming-guide, "CUDA Graphs").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


def cuda_graph(step: Step, given: Tensor) -> Step:
    """`step` for other values of `given`'s shape; what it returns is written over by the next call."""
    given, graph = given.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(given)

    def again(values: Tensor) -> Tensor:
        given.copy_(values)
        graph.replay()
        return out

    return again


RECORDERS: dict[str, Callable[[Step, Tensor], Step]] = {"cuda": cuda_graph}  # by device


class Replayed:
    """A step, recorded at its second run after `renew`: the first lets libraries make what they need."""

    def __init__(self, step: Step, device: str) -> None:
        self.step, self.record = step, RECORDERS.get(device)
        self.renew()

    def renew(self) -> None:
        """Before a step that works at other places than the last."""
        self.again: Step | None = None
        self.ran = False

    def __call__(self, given: Tensor) -> Tensor:
        """What the step returns; with a recorder only until the next call."""
        if self.record is None or not self.ran:
            self.ran = True
            return self.step(given)
        if self.again is None:
            try:
                self.again = self.record(self.step, given)
            except RuntimeError:  # a step that waits for the device, as some rotary embeddings do
                self.record = None
                return self.step(given)
        return self.again(given)
