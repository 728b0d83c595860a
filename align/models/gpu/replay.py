"""A step that is the same work at the same places every time: recorded once, then replayed without Python.

While responses are sampled, a step of a small model is a few hundred short kernels, and starting them takes longer than
they do. On a GPU they become one CUDA graph (https://docs.nvidia.com/cuda/cuda-programming-guide, "CUDA Graphs").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from align.models.acceleration import Plain, Step


class Recorder(NamedTuple):
    """How a device records a step."""

    watch: Callable[[], AbstractContextManager]  # around a step that is to be recorded next; raises RuntimeError
    record: Callable[[Step, Tensor], Step]  # what it returns runs the step for other values of the tensor's shape


@contextmanager
def never_waiting() -> Iterator[None]:
    """An error where the host waits for the GPU, as some rotary embeddings make it: that cannot be recorded."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def cuda_graph(step: Step, given: Tensor) -> Step:
    """What the step returns is written over by the next call."""
    given, graph, stream = given.clone(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            out = step(given)
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind

    def again(values: Tensor) -> Tensor:
        given.copy_(values)
        graph.replay()
        return out

    return again


class Replayed(Plain):
    """Steps, recorded at the second run after `renew`: the first lets libraries make what they need."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder  # None once something could not be recorded
        self.renew()

    def renew(self) -> None:
        """Before a step that works at other places than the last."""
        self.again: Step | None = None
        self.ran = False

    def __call__(self, step: Step, given: Tensor) -> Tensor:
        """What the step returns; once it is recorded, only until the next call."""
        if self.recorder is None:
            return step(given)
        try:
            if not self.ran:
                self.ran = True
                with self.recorder.watch():
                    return step(given)
            if self.again is None:
                self.again = self.recorder.record(step, given)
        except RuntimeError:
            self.recorder = None
            return step(given)
        return self.again(given)
