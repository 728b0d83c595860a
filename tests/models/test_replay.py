"""Steps that are replayed. No GPU is needed: a tape of the step's operations replays them on the same tensors, as a
CUDA graph does, and knows as little of Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.tiny import ATTENTION, SPECIAL, VOCABULARY, tiny_trunk
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from align.models import replay
from align.models.decode import sample
from align.models.sampling import Sampling
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


def said(trunk, sampling: Sampling) -> list[list[int]]:
    return [r.tokens.tolist() for row in sample(trunk, PROMPTS, sampling, KEYS, samples=3) for r in row]


@pytest.mark.parametrize("family", ATTENTION)
def test_replayed_steps_say_the_same(family, monkeypatch):
    trunk, tapes = tiny_trunk(family, Lora(r=4, alpha=8)), Tapes()
    sampling = Sampling(40, temperature=3.0, stop=STOPS)
    expected = said(trunk, sampling)
    assert len({len(tokens) for tokens in expected}) > 5  # rows leave while it goes on
    monkeypatch.setitem(replay.RECORDERS, "cpu", tapes)
    assert said(trunk, sampling) == expected
    assert tapes.replayed > tapes.recorded > 0


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3, "min_new": 5}, {"top_k": 5}, {"max_new": 100}])
def test_replayed_steps_heed_the_options(options, monkeypatch):
    trunk, sampling = tiny_trunk("llama", Lora(r=4, alpha=8)), Sampling(**{"max_new": 12, **options})
    expected = said(trunk, sampling)
    monkeypatch.setitem(replay.RECORDERS, "cpu", Tapes())
    assert said(trunk, sampling) == expected


def test_a_step_that_cannot_be_recorded_runs_as_it_is(monkeypatch):
    trunk, sampling = tiny_trunk("llama", Lora(r=4, alpha=8)), Sampling(12)
    expected, asked = said(trunk, sampling), []

    def refuses(step, given):
        asked.append(given)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(replay.RECORDERS, "cpu", refuses)
    assert said(trunk, sampling) == expected
    assert len(asked) == 1


def test_a_search_is_not_recorded(monkeypatch):
    """Its rows change places at every step."""
    trunk, tapes = tiny_trunk("llama", Lora(r=4, alpha=8)), Tapes()
    sampling = Sampling(8, temperature=0, beams=3)
    expected = said(trunk, sampling)
    monkeypatch.setitem(replay.RECORDERS, "cpu", tapes)
    assert said(trunk, sampling) == expected
    assert tapes.recorded == 0
