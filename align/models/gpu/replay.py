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
    try:
        return _captured(step, given)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # not before each capture: all that was cached would have to be asked for again
    return _captured(step, given)


def _captured(step: Step, given: Tensor) -> Step:
    given, graph, stream = given.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the one before comes back where a capture fails
        graph.capture_begin()
        try:
            out = step(given)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def again(values: Tensor) -> Tensor:
        given.copy_(values)
        graph.replay()
        return out

    return again


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was short, said by an error or by one that it came of: a capture ends with an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


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
        except RuntimeError as error:
            if out_of_memory(error):
                raise  # the same work without a recording would only seem to fit
            self.recorder = None
            return step(given)
        return self.again(given)
