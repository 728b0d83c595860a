"""Norms and gates as compiled functions: the values and gradients of PyTorch, one function for any number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.tiny import gradients, stir, tiny_model, tiny_tokenizer, tree
from torch.nn.functional import silu

from align.data.trees import plant
from align.models import gpu
from align.models.base import Base
from align.models.cpu import fused
from align.models.gpu import pointwise
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model

EXACT = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture
def variants(monkeypatch):
    """A list that grows at each compilation, which a backend takes as it is."""
    made = []

    def counted(graph, _given):
        made.append(graph)
        return graph

    monkeypatch.setattr(pointwise, "BACKEND", counted)
    monkeypatch.setattr(fused, "KERNELS", {})
    torch._dynamo.reset()
    pointwise._compiled.cache_clear()
    pointwise.missing.cache_clear()
    yield made
    torch._dynamo.reset()
    pointwise._compiled.cache_clear()
    pointwise.missing.cache_clear()


def agree(n: int, d: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(n)
    x, above = (torch.randn(1, n, d, generator=draw).to(dtype) for _ in range(2))
    weight = torch.rand(d, generator=draw).to(dtype)
    ours, scale = pointwise.norm(x, weight, 1e-6)
    given = x.float().requires_grad_()
    plain = torch.nn.functional.rms_norm(given, (d,), weight.float(), 1e-6)
    (slope,) = torch.autograd.grad(plain, given, above.float())
    near = {"rtol": EXACT[dtype], "atol": EXACT[dtype], "check_dtype": False}
    torch.testing.assert_close(ours, plain, **near)
    torch.testing.assert_close(scale, given.square().mean(-1, keepdim=True).add(1e-6).rsqrt(), **near)
    torch.testing.assert_close(pointwise.norm_backward(above, x, weight, scale), slope, **near)
    assert ours.dtype == dtype

    both, above = torch.randn(n, 2 * d, generator=draw).to(dtype), above[0]
    given = both.float().requires_grad_()
    plain = silu(given[:, :d]) * given[:, d:]
    (slope,) = torch.autograd.grad(plain, given, above.float())
    torch.testing.assert_close(pointwise.gated(both), plain, **near)
    torch.testing.assert_close(pointwise.gated_backward(both, above), slope, **near)


@pytest.mark.parametrize("dtype", EXACT)
def test_values_and_gradients_by_autograd(variants, dtype):
    for n in (8, 5, 1, 64):  # the first as many as the width
        agree(n, 8, dtype)
    assert len(variants) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EXACT)
def test_values_and_gradients_of_inductors_code(dtype):
    for n in (8, 5, 64):
        agree(n, 8, dtype)


def test_a_trunk_computes_the_same_with_them(variants, monkeypatch):
    def made(adopt) -> tuple[Trunk, list[torch.Tensor], list[list[int]]]:
        base = Base(tiny_model("llama"), tiny_tokenizer(), "fingerprint", "tiny", "tiny")
        trunk = Trunk(base, Model(base="tiny", dtype="float32"), Lora(r=4))
        adopt(trunk.causal)
        stir(trunk)
        logprobs = trunk(plant([tree(9, 4, 5), tree(12)]))
        prompt = np.arange(5, dtype=np.int32) + 9
        said = sample(trunk, [prompt], Sampling(6, temperature=0), [(0,)], samples=1)
        return [logprobs, *gradients(trunk, logprobs).values()], [r.tokens.tolist() for r in said[0]]

    numbers, said = made(lambda model: None)
    assert not variants
    monkeypatch.setitem(fused.KERNELS, "cpu", pointwise)
    ours, also = made(fused.fuse)
    assert len(variants) == 5  # two of norms, two of gates, one of gates in wider rows, such as prepared products give
    assert also == said
    for one, other in zip(ours, numbers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_nothing_changes_but_a_remark(variants, monkeypatch):
    def none(*_given):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(pointwise, "BACKEND", none)
    gpu.OFFER.adopt(tiny_model("llama"))
    assert not fused.KERNELS
    (remark,) = gpu.OFFER.remarks(None)
    assert "no compiler here" in remark


def test_where_they_compile_they_are_taken(variants):
    gpu.OFFER.adopt(tiny_model("llama"))
    assert {"cuda": pointwise} == fused.KERNELS
    assert gpu.OFFER.remarks(None) == []
