"""The C kernels against float64 formulas and against PyTorch's way, to bfloat16's rounding."""

from __future__ import annotations

import subprocess

import pytest
import torch
from models.test_trunk import FORESTS
from models.tiny import tiny_model, tiny_trunk, tree
from torch import Tensor, nn
from torch.nn import functional

from align.data.trees import TreeMask, plant
from align.models.attention import ForestMask
from align.models.cpu import compiled, native
from align.models.cpu.blocks import Blocks
from align.models.cpu.compiled import LANES, serve
from align.models.cpu.fixed import fixed_products
from align.models.cpu.native import Small
from align.models.cpu.segments import segment_attention
from align.models.trunk import Trunk
from align.recipe.schema import Lora

NEEDS = pytest.mark.skipif(
    not serve(torch.ones(1, LANES, dtype=torch.bfloat16)), reason="needs AVX512-BF16 and a C compiler"
)
ROUNDING = 2**-8  # of bfloat16; float32 sums of such numbers add nothing to speak of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw).bfloat16()


def near(found: Tensor, known: Tensor, tolerance: float = ROUNDING) -> None:
    assert found.shape == known.shape
    assert (found.double() - known).norm() <= tolerance * known.norm() + 1e-5  # where the truth is 0


def wide(*tensors: Tensor) -> list[Tensor]:
    """In float64, to be differentiated."""
    return [part.detach().double().requires_grad_() for part in tensors]


@NEEDS
@pytest.mark.parametrize("n", [1, 7])
def test_norms_and_gates(n):
    x, weight, above = drawn(1, n, 48), drawn(48), drawn(1, n, 48, seed=5)
    out, scale = native.norm(x, weight, 1e-3)
    (exact,) = wide(x)
    known = weight.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    known.backward(above.double())
    near(out, known)
    near(native.norm_backward(above, x, weight, scale), exact.grad)

    both, above = 6 * drawn(n, 96), drawn(n, 48, seed=7)
    both[0, :4] = torch.tensor([100.0, -100.0, 3e38, -3e38])  # where e^x is beyond float32
    (exact,) = wide(both)
    gate, up = exact.chunk(2, -1)
    known = functional.silu(gate) * up
    known.backward(above.double())
    some = torch.ones(n, 48, dtype=torch.bool)
    some[0, :4] = False
    near(native.gated(both)[some], known[some])
    assert native.gated(both)[0, 1] == 0
    assert native.gated(both)[0, 3] == 0
    near(native.gated_backward(both, above)[:, :48][some], exact.grad[:, :48][some])
    near(native.gated_backward(both, above)[:, 48:][some], exact.grad[:, 48:][some])
    apart = drawn(n, 112)[:, :96]  # rows with something between them
    assert torch.equal(native.gated(apart), native.gated(apart.contiguous()))


FOREST = [tree(5, 3, 4), tree(70, 130, 1), tree(300), tree(20), tree(63, 64, 65), tree(1)]


@NEEDS
@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (4, 1, 16), (2, 2, 256)])
@pytest.mark.parametrize("trees", [FOREST, [tree(1)], [tree(129)]], ids=["forest", "a token", "over a chunk"])
def test_attention_is_a_masked_softmax(heads, groups, size, trees):
    forest = plant(trees)
    length = forest.tokens.shape[1]
    shapes = ((1, heads, length, size), (1, groups, length, size), (1, groups, length, size))
    given = [drawn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    found = segment_attention(*given, ForestMask(forest), 0.3 / size**0.5, None, None)
    assert "Kernel" in type(found.grad_fn).__name__
    exact, above = wide(*given), drawn(1, length, heads, size, seed=4)
    key, value = (part.repeat_interleave(heads // groups, 1) for part in exact[1:])
    known = functional.scaled_dot_product_attention(
        exact[0], key, value, TreeMask(forest).dense, scale=0.3 / size**0.5
    ).transpose(1, 2)
    near(found, known)
    found.backward(above)
    known.backward(above.double())
    for ours, theirs in zip(given, exact, strict=True):
        near(ours.grad, theirs.grad)


def test_values_of_another_width_than_queries_are_left_to_pytorch():
    """As in multi-head latent attention."""
    forest = plant([tree(40), tree(30, 20, 9)])
    query, key = (drawn(1, 2, forest.tokens.shape[1], 32, seed=i) for i in range(2))
    value = drawn(1, 2, forest.tokens.shape[1], 16, seed=2)
    found = segment_attention(query, key, value, ForestMask(forest), 0.2, None, None)
    given = [part.double() for part in (query, key, value)]
    known = functional.scaled_dot_product_attention(*given, TreeMask(forest).dense, scale=0.2).transpose(1, 2)
    near(found, known, 3 * ROUNDING)


@NEEDS
def test_no_tree_feels_another_not_even_in_the_last_bit():
    forest, others = plant([tree(40), tree(30, 20, 9)]), slice(40, None)
    given = [drawn(1, 2, forest.tokens.shape[1], 32, seed=i) for i in range(3)]
    changed = [part.clone() for part in given]
    for part in changed:
        part[:, :, :40] = 50 * drawn(1, 2, 40, 32, seed=8)
    out, moved = (native.attention(*parts, Blocks(forest), 0.2)[0] for parts in (given, changed))
    assert torch.equal(out[:, others], moved[:, others])
    assert not torch.equal(out[:, :40], moved[:, :40])


LAYERS = [
    pytest.param(33, 48, [16], [32], id="one"),
    pytest.param(50, 32, [16, 16, 16], [48, 16, 16], id="three"),
    pytest.param(1, 64, [4, 20], [64, 96], id="ranks that fill no vector, of one token"),
    pytest.param(17, 16, [1], [16], id="rank 1"),
    pytest.param(20, 112, [64, 64], [16, 160], id="large ranks"),
]


@NEEDS
@pytest.mark.parametrize(("n", "inputs", "ranks", "heights"), LAYERS)
def test_small_products_and_their_gradients(n, inputs, ranks, heights):
    x, above = drawn(n, inputs), drawn(n, sum(heights), seed=2)
    trained = []
    for rank, height in zip(ranks, heights, strict=True):
        trained += [drawn(rank, inputs, seed=rank).float(), drawn(height, rank, seed=height).float()]
    small, out, below = Small(trained, 0.5), drawn(n, sum(heights), seed=6), drawn(n, inputs, seed=7)
    low = small.down(x)
    exact, *matrices = wide(x, *trained)
    parts = [0.5 * exact @ a.T @ b.T for a, b in zip(matrices[::2], matrices[1::2], strict=True)]
    known = torch.cat(parts, 1)
    known.backward(above.double())
    near(small.up(small.packed(), low, torch.zeros_like(out)), known, 2 * ROUNDING)
    near(small.up(small.packed(), low, out.clone()), known + out, 2 * ROUNDING)
    up, gradients = small.backward(above, x, low)
    near(small.onwards(up, below.clone()), exact.grad + below, 2 * ROUNDING)
    for found, matrix in zip(gradients, matrices, strict=True):
        near(found, matrix.grad, 2 * ROUNDING)
    low = x @ small.stacked().bfloat16().T  # as a product of its own gives it
    near(small.up(small.packed(), low, torch.zeros_like(out)), known, 3 * ROUNDING)


@NEEDS
def test_the_number_of_threads_changes_no_bit():
    x, above = drawn(70, 64), drawn(70, 128, seed=1)
    trained = [drawn(16, 64).float(), drawn(96, 16).float(), drawn(8, 64).float(), drawn(32, 8).float()]
    forest = plant(FOREST)
    given = [drawn(1, heads, forest.tokens.shape[1], 32, seed=heads) for heads in (4, 2, 2)]

    def numbers() -> list[Tensor]:
        small, mask = Small(trained, 2.0), Blocks(forest)
        low = small.down(x)
        up, gradients = small.backward(above, x, low)
        out, logsum = native.attention(*given, mask, 0.2)
        back = native.attention_backward(out, tuple(given), mask, 0.2, out, logsum)
        of_norm, scale = native.norm(x, x[0], 1e-5)
        return [low, small.up(small.packed(), low, above.clone()), up, *gradients, out, *back, of_norm, scale]

    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(numbers())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def sized(seed: int = 0) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model("llama", seed, **sizes, head_dim=32, initializer_range=0.1).bfloat16()


def trunk_of(*, awake: bool = True) -> Trunk:
    """In bfloat16, with an adapter that does something, or is at its start."""
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8), "tree", model=sized())
    for name, p in trunk.named_parameters():
        if "lora_B" in name and not awake:
            nn.init.zeros_(p)
    return trunk


@NEEDS
def test_a_trunk_says_and_learns_the_same_with_kernels_and_without(monkeypatch):
    trunk, forest = trunk_of(), plant(FORESTS["pairs"])
    calls = []
    monkeypatch.setattr(native, "call", lambda name, *args: calls.append(name) or compiled.call(name, *args))

    def learnt() -> list[Tensor]:
        trunk.zero_grad()
        logprobs = trunk(forest)
        logprobs.sum().backward()
        return [logprobs.detach(), torch.cat([p.grad.flatten() for p in trunk.parameters() if p.requires_grad])]

    ours = learnt()
    assert {name.split("_")[0] for name in calls} == {"norm", "gated", "attention", "lora"}
    with torch.no_grad():  # whatever is kept for a gradient or not
        assert torch.equal(trunk(forest), ours[0])
    monkeypatch.setattr(compiled, "library", lambda: None)
    calls.clear()
    plain = learnt()
    assert not calls
    for found, known in zip(ours, plain, strict=True):
        assert (found - known).norm() <= 0.03 * known.norm()


@NEEDS
def test_an_adapter_at_its_start_is_the_bare_trunk_to_the_bit():
    trunk, forest = trunk_of(awake=False), plant(FORESTS["pairs"])
    actor = trunk(forest)
    with torch.no_grad(), trunk.acting(None):
        assert torch.equal(trunk(forest), actor)
    assert not torch.equal(trunk_of()(forest), actor)


@NEEDS
def test_prepared_products_take_the_kernels_along():
    trunk, forest = trunk_of(), plant(FORESTS["pairs"])
    with torch.no_grad():
        plain = trunk.states(forest).float()
        with fixed_products(trunk, 64):
            fixed = trunk.states(forest).float()
    assert (fixed - plain).norm() <= 0.02 * plain.norm()


@pytest.mark.skipif(not compiled.suits(), reason="the kernels are for processors with AVX512-BF16")
@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"], ids=["none there", "one that fails"])
def test_without_a_compiler_pytorch_does_the_work(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(compiled, "COMPILERS", ())
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "library", compiled.cache(compiled.library.__wrapped__))
    assert compiled.library() is None
    assert not serve(torch.ones(1, LANES, dtype=torch.bfloat16))
    assert not list(tmp_path.glob("cache/kernels/*"))
    trunk = trunk_of()
    assert [remark for remark in trunk.remarks if "could not be compiled" in remark]
    assert trunk(plant(FORESTS["pairs"])).isfinite().all()


@NEEDS
@pytest.mark.slow
def test_they_are_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    made = compiled._compiled("cc")
    assert made.parent == tmp_path / "cache" / "kernels"
    assert list(made.parent.iterdir()) == [made]

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    assert compiled._compiled("cc") == made


def test_other_dtypes_and_widths_are_left_to_pytorch():
    assert not serve(torch.ones(2, LANES))
    assert not serve(torch.ones(2, LANES + 1, dtype=torch.bfloat16))
    assert not serve(torch.ones(0, LANES, dtype=torch.bfloat16))
