"""Portions that sampling is done in: prompts of a pass, groups that are kept at once, tokens between two looks. None of
them changes a response, and what is not needed any more is let go before more is made."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from models.tiny import FEW, SPECIAL, VOCABULARY, tiny_trunk
from torch.utils._python_dispatch import TorchDispatchMode

from align.models.sampling import decode
from align.models.sampling import rows as rows_module
from align.models.sampling.cache import KeyValues, Recorder
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.recipe.schema import Lora

LENGTHS = (7, 3, 12, 1, 9)
PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in LENGTHS]
KEYS = [(0, i) for i in range(len(PROMPTS))]
STOPS = ("a", "e", "o")  # a tiny model seldom ends by itself


@pytest.fixture(scope="module")
def trunk():
    return tiny_trunk("llama", Lora(r=4, alpha=8))


def said(trunk, sampling: Sampling, **more) -> list[tuple[list[int], bool]]:
    found = sample(trunk, PROMPTS, sampling, KEYS, samples=3, **more)
    return [(r.tokens.tolist(), r.ended) for row in found for r in row]


@pytest.mark.parametrize("family", FEW)
def test_prompts_in_several_passes_get_the_same_responses(family, monkeypatch):
    trunk, sampling, passes = tiny_trunk(family, Lora(r=4, alpha=8)), Sampling(12, temperature=2.0), []
    expected, whole = said(trunk, sampling), rows_module.Rows._pass

    def counted(self, prompts, recorder):
        passes.append([len(prompt) for prompt in prompts])
        return whole(self, prompts, recorder)

    monkeypatch.setattr(rows_module.Rows, "_pass", counted)
    monkeypatch.setattr(trunk, "budgets", trunk.budgets._replace(prompt_tokens=16))
    assert said(trunk, sampling) == expected
    assert passes == [[12], [9, 7], [3, 1]]
    monkeypatch.setattr(trunk, "budgets", trunk.budgets.asked(100))
    passes.clear()
    assert said(trunk, sampling) == expected
    assert passes == [[12], [9], [7], [3, 1]]  # groups: three rows of 12 + 12 tokens, …; of 3 + 12 and 1 + 12 together


@pytest.mark.parametrize("every", [3, 8, 100])
@pytest.mark.parametrize("stop", [(), STOPS])
def test_looking_every_few_tokens_changes_no_response(trunk, every, stop, monkeypatch):
    sampling = Sampling(30, temperature=3.0, stop=stop, min_new=2)
    expected = said(trunk, sampling)
    assert len({len(tokens) for tokens, _ in expected}) > 1
    monkeypatch.setitem(decode.LOOK, "cpu", every)
    assert said(trunk, sampling) == expected


def test_what_is_told_ends_where_responses_end(trunk, monkeypatch):
    sampling = Sampling(20, temperature=3.0, stop=STOPS)
    for every in (1, 8):
        monkeypatch.setitem(decode.LOOK, "cpu", every)
        told = []
        expected = sum(len(tokens) for tokens, _ in said(trunk, sampling, heed=told.append))
        assert sum(map(len, told)) == expected


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers and sizes that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        packet = operation.overloadpacket
        if packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select):
            self.count += 1
        return operation(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch):
    mode = Waits()
    with monkeypatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            own = getattr(torch.Tensor, name)

            def counted(tensor, *args, own=own, **kwargs):
                mode.count += 1
                return own(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        with mode:
            yield mode


def test_the_host_waits_once_every_few_tokens(trunk, monkeypatch):
    monkeypatch.setattr(trunk.replayed, "recorder", object())  # room for all tokens from the start, as on a GPU
    monkeypatch.setattr(type(trunk.replayed), "__call__", lambda self, step, given: step(given))
    counts = {}
    for every in (1, 8):
        monkeypatch.setitem(decode.LOOK, "cpu", every)
        for new in (16, 64):
            with waits(monkeypatch) as mode:
                said(trunk, Sampling(new, min_new=new), heed=lambda _: None)
            counts[every, new] = mode.count
    assert counts[1, 64] - counts[1, 16] == 2 * 48  # `.cpu().numpy()` counts twice
    assert counts[8, 64] - counts[8, 16] == 2 * 48 / 8


def test_rows_that_leave_never_take_half_a_cache_more():
    kept, recorded = KeyValues([4] * 8, 4, torch.device("cpu")), Recorder()
    for layer in range(6):
        recorded.update(*torch.randn(2, 1, 2, 32, 8), layer)
    kept.take(recorded, 0, [(4 * i, 4 * i + 4) for i in range(8)])
    assert not recorded.layers
    before = {layer: tuple(part.clone() for part in parts) for layer, parts in kept.layers.items()}
    old, alive = [weakref.ref(part) for parts in kept.layers.values() for part in parts], []

    class Live(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.overloadpacket == torch.ops.aten.index:
                alive.append(sum(ref() is not None for ref in old))
            return operation(*args, **(kwargs or {}))

    gc.disable()
    try:
        with Live():
            kept.keep(torch.tensor([1, 6, 6]))
    finally:
        gc.enable()
    assert alive[1:] == [12, 12, 10, 10, 8, 8, 6, 6, 4, 4, 2, 2]  # the first is of the lengths
    for layer, parts in kept.layers.items():
        for part, whole in zip(parts, before[layer], strict=True):
            assert torch.equal(part, whole[[1, 6, 6]])


def test_a_group_is_gone_before_the_next_is_made(trunk, monkeypatch):
    made, alive, living = decode.Rows, [], []

    def watched(*args):
        living.append(sum(ref() is not None for ref in alive))
        found = made(*args)
        alive.extend([weakref.ref(found), weakref.ref(found.kept)])
        return found

    monkeypatch.setattr(decode, "Rows", watched)
    monkeypatch.setattr(trunk, "budgets", trunk.budgets.asked(1))
    gc.disable()
    try:
        said(trunk, Sampling(4))
    finally:
        gc.enable()
    assert living == [0] * len(PROMPTS)
