"""Log-probabilities in chunks equal log-softmax over whole logits, and so do their gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from align.objectives import logprobs
from align.objectives.logprobs import linear_entropy, linear_logprobs

KINDS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 2.0},
    "scaled and capped": {"scale": 1.7, "softcap": 2.0},
}


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, bias=None, *, scale=1.0, softcap=None) -> Tensor:
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def made(n=13, d=6, v=11, dtype=torch.float64, bias=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (torch.randn(shape, generator=draw, dtype=dtype) for shape in ((n, d), (v, d), (v,)))
    return hidden, weight, torch.randint(v, (n,), generator=draw), offset if bias else None


@pytest.fixture(params=[32 * 2**20, 4 * 11 * 4], ids=["one chunk", "chunks of 4"], autouse=True)
def chunked(request, monkeypatch):
    for function in (logprobs.linear_logprobs, logprobs.linear_kl, logprobs.linear_entropy):
        monkeypatch.setitem(inspect.unwrap(function).__kwdefaults__, "chunk_bytes", request.param)


@pytest.mark.parametrize("trained", ["hidden", "weight", "hidden weight bias", "bias", ""])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_whole_logits(kind, trained, dtype, tolerance):
    hidden, weight, labels, bias = made(dtype=dtype)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items() if name in trained.split()}
    found = linear_logprobs(hidden, weight, labels, bias, **KINDS[kind])
    expected = whole(hidden, weight, labels, bias, **KINDS[kind])
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found.requires_grad == bool(leaves)
    if leaves:
        upstream = torch.linspace(-1, 2, len(labels), dtype=dtype)
        ours, theirs = (torch.autograd.grad((x * upstream).sum(), list(leaves.values())) for x in (found, expected))
        for name, a, b in zip(leaves, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_by_finite_differences(kind, frozen):
    hidden, weight, labels, bias = made(n=5)
    inputs = (hidden.requires_grad_(),) if frozen else tuple(t.requires_grad_() for t in (hidden, weight, bias))

    def function(hidden, weight=weight, bias=bias):
        return linear_logprobs(hidden, weight, labels, bias, **KINDS[kind])

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_labels(frozen):
    hidden, weight, labels, bias = made(n=0)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    found = linear_logprobs(hidden, weight, labels, bias)
    found.sum().backward()
    assert found.shape == (0,)
    assert hidden.grad.shape == (0, 6)
    if not frozen:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_sums_in_float32():
    """Only the product is rounded: the log-softmax of the rounded logits is exact to float32."""
    hidden, weight, labels, _ = made(n=64, d=32, v=200, dtype=torch.bfloat16, bias=False)
    hidden.requires_grad_()
    found = linear_logprobs(hidden, weight, labels)
    rounded = hidden.detach() @ weight.T
    assert found.dtype == torch.float32
    expected = rounded.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    found.sum().backward()
    exact = hidden.detach().float().requires_grad_()
    whole(exact, weight.float(), labels).sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad.float() - exact.grad).abs().max() < 0.02 * exact.grad.abs().max()


def test_logits_of_any_size_stay_finite():
    hidden, weight, labels, _ = made(dtype=torch.float32, bias=False)
    hidden = (hidden * 1e4).requires_grad_()
    found = linear_logprobs(hidden, weight, labels)
    torch.testing.assert_close(found, whole(hidden, weight, labels), rtol=1e-5, atol=0.05)
    found.sum().backward()
    assert hidden.grad.isfinite().all()


def whole_entropy(hidden: Tensor, weight: Tensor, bias=None, *, scale=1.0, softcap=None) -> Tensor:
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_entropy_and_its_gradient_are_those_of_whole_logits(kind, biased, dtype, tolerance):
    hidden, weight, _, bias = made(dtype=dtype, bias=biased)
    hidden.requires_grad_()
    found, expected = (entropy(hidden, weight, bias, **KINDS[kind]) for entropy in (linear_entropy, whole_entropy))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 2, len(hidden), dtype=dtype)
    ours, theirs = (torch.autograd.grad((x * upstream).sum(), hidden)[0] for x in (found, expected))
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_entropies_beside_log_probabilities_are_the_same(kind):
    hidden, weight, labels, bias = made()
    filled = torch.full((len(hidden),), torch.nan, dtype=hidden.dtype)
    alone = linear_logprobs(hidden, weight, labels, bias, **KINDS[kind])
    assert torch.equal(linear_logprobs(hidden, weight, labels, bias, **KINDS[kind], entropies=filled), alone)
    torch.testing.assert_close(filled, whole_entropy(hidden, weight, bias, **KINDS[kind]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_entropy_by_finite_differences(kind):
    hidden, weight, _, bias = made(n=5)
    assert torch.autograd.gradcheck(lambda h: linear_entropy(h, weight, bias, **KINDS[kind]), hidden.requires_grad_())


def test_entropy_at_its_ends():
    """Equal logits: log V; one far above the others: 0; both without a gradient, and finite."""
    hidden = torch.tensor([[0.0, 0.0], [1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
    found = linear_entropy(hidden, weight)
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0]).log())
    found.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(2, 2))
    assert linear_entropy(hidden[:0], weight).shape == (0,)


def test_entropy_of_bfloat16_is_summed_in_float32():
    hidden, weight, *_ = made(n=64, d=32, v=200, dtype=torch.bfloat16, bias=False)
    found = linear_entropy(hidden, weight)
    assert found.dtype == torch.float32
    rounded = (hidden @ weight.T).float()
    torch.testing.assert_close(found, torch.distributions.Categorical(logits=rounded).entropy(), rtol=1e-5, atol=1e-5)


def test_the_entropy_of_a_head_that_trains_is_refused():
    hidden, weight, *_ = made(bias=False)
    with pytest.raises(AssertionError, match="the head must be frozen"):
        linear_entropy(hidden, weight.requires_grad_())
