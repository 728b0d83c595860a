"""Steps that are replayed. No GPU is needed: a tape of the step's operations replays them on the same tensors, as a
CUDA graph does, and knows as little of Python."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models.tiny import FEW, SPECIAL, VOCABULARY, tiny_trunk
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from align.models.gpu import replay
from align.models.sampling import decode
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.recipe.schema import Lora

PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in (7, 3, 12, 1)]
STOPS = ("a", "e", "o")  # a tiny model seldom ends by itself
KEYS = [(0, i) for i in range(len(PROMPTS))]


class Tape(TorchDispatchMode):
    """Every operation that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out


class Tapes:
    """A recorder; `recorded` and `replayed` count."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step, given):
        given, tape = given.clone(), Tape()
        with tape:
            first = step(given)  # a CUDA graph would not have run yet, but at its first call
        ready = [first]
        self.recorded += 1

        def again(values):
            self.replayed += 1
            if ready:
                return ready.pop()
            given.copy_(values)
            new: dict[int, torch.Tensor] = {}
            for operation, args, kwargs, out in tape.calls:
                args, kwargs = tree_map_only(torch.Tensor, lambda t, new=new: new.get(id(t), t), (args, kwargs))
                made = operation(*args, **kwargs)
                new |= {id(old): now for old, now in zip(tree_leaves(out), tree_leaves(made), strict=True)}
            return new[id(first)]

        return again


def records(trunk, monkeypatch, record, watch=nullcontext) -> None:
    """From now on as if the CPU recorded its steps."""
    trunk.replayed = replay.Replayed(replay.Recorder(watch, record))


def said(trunk, sampling: Sampling) -> list[list[int]]:
    return [r.tokens.tolist() for row in sample(trunk, PROMPTS, sampling, KEYS, samples=3) for r in row]


@pytest.mark.parametrize("family", FEW)
def test_replayed_steps_say_the_same(family, monkeypatch):
    trunk, tapes = tiny_trunk(family, Lora(r=4, alpha=8)), Tapes()
    sampling = Sampling(24, temperature=3.0, stop=STOPS)
    expected = said(trunk, sampling)
    assert len({len(tokens) for tokens in expected}) > 4  # rows leave while it goes on
    records(trunk, monkeypatch, tapes)
    assert said(trunk, sampling) == expected
    assert tapes.replayed > tapes.recorded > 0


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3, "min_new": 5}, {"top_k": 5}, {"max_new": 100}])
def test_replayed_steps_heed_the_options(options, monkeypatch):
    trunk, sampling = tiny_trunk("llama", Lora(r=4, alpha=8)), Sampling(**{"max_new": 12, **options})
    expected, tapes = said(trunk, sampling), Tapes()
    records(trunk, monkeypatch, tapes)
    assert said(trunk, sampling) == expected
    assert tapes.recorded > 0


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_cannot_be_recorded_runs_as_it_is(late, monkeypatch):
    """Found out before it ran, or when all was made that its layers share, which then holds nothing of use."""
    trunk, sampling = tiny_trunk("llama", Lora(r=4, alpha=8)), Sampling(12)
    expected, asked = said(trunk, sampling), []

    def refuses(step, given):
        asked.append(given)
        if late:
            kept = step.__self__.kept
            lengths = kept.lengths.clone()
            step(given)
            kept.lengths.copy_(lengths)
            kept._unseen = {None: torch.ones_like(kept.unseen(None))}
        raise RuntimeError("operation not permitted when stream is capturing")

    records(trunk, monkeypatch, refuses)
    assert said(trunk, sampling) == expected
    assert said(trunk, sampling) == expected
    assert len(asked) == 1


def test_a_step_that_waits_for_the_device_is_not_recorded(monkeypatch):
    """The watch ends it in the middle, where it would wait."""
    trunk, sampling, tapes, watched = tiny_trunk("llama", Lora(r=4, alpha=8)), Sampling(12), Tapes(), []
    expected = said(trunk, sampling)

    @contextmanager
    def watch():
        watched.append(True)
        yield
        watched.pop()

    def waits(*_args):
        if watched:
            watched.clear()
            raise RuntimeError("called a synchronizing CUDA operation")

    records(trunk, monkeypatch, tapes, watch)
    trunk.layers[-1].mlp.register_forward_pre_hook(waits)
    assert said(trunk, sampling) == expected
    assert tapes.recorded == 0


def test_nothing_of_a_sampling_is_left(monkeypatch):
    trunk, alive = tiny_trunk("llama", Lora(r=4, alpha=8)), []
    made = decode.Rows

    def watched(*args):
        found = made(*args)
        alive.extend([weakref.ref(found), weakref.ref(found.kept)])
        return found

    records(trunk, monkeypatch, Tapes())
    monkeypatch.setattr(decode, "Rows", watched)
    gc.disable()
    try:
        said(trunk, Sampling(12))
        assert len(alive) == 2
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


def test_a_search_is_not_recorded(monkeypatch):
    """Its rows change places at every step."""
    trunk, tapes = tiny_trunk("llama", Lora(r=4, alpha=8)), Tapes()
    sampling = Sampling(8, temperature=0, beams=3)
    expected = said(trunk, sampling)
    records(trunk, monkeypatch, tapes)
    assert said(trunk, sampling) == expected
    assert tapes.recorded == 0


@pytest.mark.parametrize("within", [False, True])
def test_memory_that_is_short_is_said(within, monkeypatch):
    """By the step itself, or by the capture that it broke."""
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))

    def refuses(step, given):
        try:
            raise torch.OutOfMemoryError("out of memory")
        finally:
            if within:
                raise RuntimeError("operation failed due to a previous error during capture")

    records(trunk, monkeypatch, refuses)
    with pytest.raises(RuntimeError) as told:
        said(trunk, Sampling(12))
    assert replay.out_of_memory(told.value)
    assert trunk.replayed.recorder is not None


@pytest.mark.parametrize("short", [0, 1, 2])
def test_a_capture_empties_the_allocators_cache_only_where_memory_is_short(short, monkeypatch):
    """Of CUDA stands here what a capture calls; a step that fails at its first `short` captures."""
    emptied, begun, ended = [], [], []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(capture_begin=lambda: begun.append(1), capture_end=lambda: ended.append(1), replay=int)
    cuda = SimpleNamespace(
        CUDAGraph=lambda: graph, Stream=lambda: stream, current_stream=lambda: stream,
        stream=lambda _: nullcontext(), empty_cache=lambda: emptied.append(len(begun)),
    )  # fmt: skip

    def step(given):
        if len(begun) <= short:
            raise torch.OutOfMemoryError("out of memory")
        return given + 1

    monkeypatch.setattr(torch, "cuda", cuda)
    if short == 2:
        with pytest.raises(torch.OutOfMemoryError):
            replay.cuda_graph(step, torch.zeros(2))
    else:
        assert replay.cuda_graph(step, torch.zeros(2))(torch.ones(2)).tolist() == [1, 1]
    assert emptied == ([1] if short else [])
    assert begun == ended
