"""FlexAttention over a forest. PyTorch has no backward pass of it on a CPU, and says so: the tests switch that sentence
off and let dynamo trace it, with the operation's own dense formula as the backend. What a GPU's kernels compute is not
tested here; which blocks they are told of, which function they come from and how often it is compiled is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as of_torch
from models.tiny import tiny_model, tiny_tokenizer, tree
from ppo_start import make_start
from ppo_start import recipe_of as ppo_recipe
from torch._dynamo.exc import FailOnRecompileLimitHit
from world import align

from align import dpo, ppo, sft
from align.data.trees import Forest, Tree, TreeMask, plant
from align.models import acceleration
from align.models.acceleration import Offer
from align.models.attention import ForestMask, dense_attention
from align.models.base import Base
from align.models.gpu import flex
from align.models.trunk import Trunk
from align.recipe.schema import Lora, Model


@pytest.fixture
def variants(monkeypatch):
    """FlexAttention on a CPU, and a list that grows by one at each compilation."""
    made = []

    def counted(graph, _given):
        made.append(graph)
        return graph

    monkeypatch.setattr(of_torch, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "BACKEND", counted)
    monkeypatch.setattr(Trunk, "row_multiple", 256)
    monkeypatch.setattr(acceleration, "offer", lambda device: Offer(attention=flex.flex_attention))
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    yield made
    torch._dynamo.reset()
    flex._compiled.cache_clear()


def random_forest(draw: np.random.Generator) -> Forest:
    """Of one to six trees, whose segments continue any other that may be continued."""
    trees = []
    for _ in range(draw.integers(1, 7)):
        lengths, parents, line = [draw.integers(1, 40)], [], [0]
        for i in range(1, draw.integers(1, 9)):
            line = line[: draw.integers(1, len(line) + 1)]  # back to one of the segments that this one may continue
            parents.append(line[-1])
            line.append(i)
            lengths.append(draw.integers(1, 40))
        marks = tuple(draw.random(n) < 0.5 for n in lengths)
        trees.append(Tree(tuple(np.ones(n, np.int32) for n in lengths), marks, parents=tuple(map(int, parents))))
    return plant(trees, multiple=32)


def related(forest: Forest) -> torch.Tensor:
    """(L, L) bool, from the parents alone: whether the row's segment is the column's or continues it."""
    known = np.eye(len(forest.parents), dtype=bool)
    for i, above in enumerate(forest.parents):
        if above >= 0:
            known[i] |= known[above]
    segment = forest.segment[0]
    return torch.from_numpy(known)[segment[:, None], segment[None]]


def test_what_sees_a_key_is_one_stretch(monkeypatch):
    """On 300 forests: the stretch is what the parents say, and blocks are what a search finds in the dense mask."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    draw, whole_blocks, nested = np.random.default_rng(0), 0, 0
    for number in range(300):
        forest = random_forest(draw)
        mask, index = TreeMask(forest), torch.arange(forest.tokens.shape[1])
        seen = related(forest) & (index[:, None] >= index)
        assert torch.equal(mask.dense[0, 0], seen)
        blocks = seen.view(len(seen) // 16, 16, -1, 16).transpose(1, 2).flatten(2)
        some, whole = flex.seen_blocks(mask.last, forest.positions[0], None)
        assert torch.equal(whole, blocks.all(-1))
        assert torch.equal(some, blocks.any(-1) & ~blocks.all(-1))
        window = 1 + number % 50
        positions = forest.positions[0]
        near = seen & (positions[:, None] - positions < window)
        some, whole = flex.seen_blocks(mask.last, positions, positions + window)
        assert not whole.any()
        assert (some >= near.view(len(seen) // 16, 16, -1, 16).any(1).any(-1)).all(), "none is missed"
        assert (some <= blocks.any(-1)).all()
        whole_blocks += int(blocks.all(-1).sum())
        nested += max((above > 0 for above in forest.parents), default=False)
    assert whole_blocks > 100
    assert nested > 100


def test_blocks_are_listed_for_queries_and_for_keys():
    forest = plant([tree(300, 150, 200, seed=1), tree(40), tree(500), tree(90, 30, 20, 5)], multiple=256)
    mask = TreeMask(forest)
    ours = of_torch.BlockMask(forest.tokens.shape[1:] * 2, *flex.seen_of(forest, None).blocks)
    found = of_torch.create_block_mask(
        lambda _b, _h, q, k: mask.dense[0, 0, q, k], 1, 1, *forest.tokens.shape[1:] * 2, device="cpu"
    )
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(found, name)), name
        numbers, theirs = (getattr(each, name.replace("num_blocks", "indices"))[0, 0] for each in (ours, found))
        for count, one, other in zip(getattr(ours, name)[0, 0], numbers, theirs, strict=True):
            assert torch.equal(one[:count], other[:count]), name
    assert ours.full_kv_num_blocks.sum() > 3  # blocks that need no mask
    near = of_torch.BlockMask(forest.tokens.shape[1:] * 2, *flex.seen_of(forest, 60).blocks)
    assert near.kv_num_blocks.sum() < ours.kv_num_blocks.sum() + ours.full_kv_num_blocks.sum()


def states(length: int, size: int = 16, heads: tuple[int, ...] = (4, 2, 2)) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    return [torch.randn(1, length, n, size, generator=draw).transpose(1, 2) for n in heads]


def compared(forest: Forest, window: int | None = None, softcap: float | None = None, *, grad: bool = True) -> None:
    results = []
    for attend in (flex.flex_attention, dense_attention):
        given = [part.clone().requires_grad_(grad) for part in states(forest.tokens.shape[1])]
        with torch.set_grad_enabled(grad):
            out = attend(*given, ForestMask(forest), 0.2, window, softcap)
        results.append([out, *(torch.autograd.grad(out.square().sum(), given) if grad else [])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=3e-5)


ROWS = [[tree(100, 30, 40), tree(60)], [tree(300, 90, 60), tree(60)], [tree(900, 30, 40), tree(700)]]


def test_values_and_gradients_are_those_of_the_dense_mask_in_one_function_for_rows_of_any_length(variants):
    """The first row has as many blocks as there are key heads, the second as many as query heads."""
    for trees in ROWS:
        compared(plant(trees, multiple=256))
    assert len(variants) == 1
    for window in (20, 31):
        compared(plant(ROWS[0], multiple=256), window, grad=False)
        compared(plant(ROWS[1], multiple=256), window, grad=False)
    assert len(variants) == 2
    compared(plant(ROWS[1], multiple=256), softcap=2.0, grad=False)
    assert len(variants) == 3


def test_too_many_variants_are_an_error_and_never_dense_scores(variants, monkeypatch):
    monkeypatch.setitem(flex.SETTINGS, "recompile_limit", 1)
    forest = plant(ROWS[0], multiple=256)
    flex.flex_attention(*states(256), ForestMask(forest), 0.2, None, None)
    with pytest.raises(FailOnRecompileLimitHit):
        flex.flex_attention(*states(256, 32), ForestMask(forest), 0.2, None, None)


@pytest.mark.slow
def test_runs_of_three_stages_compile_at_most_six_variants(variants, world, cache, here, tmp_path_factory):
    """One with a gradient and one without, the trial of the layout included. Rows of several lengths, gradient
    checkpointing, several roles, evaluations, prompts that are sampled from."""
    less = {"log": {"samples": ["And?"], "sample_tokens": 4}, "train": {"steps": 3, "save_every": None}}
    recipes = [
        (sft, world.recipe(here / "sft.yaml", run=str(here / "sft"), **less)),
        (dpo, world.preferences(here / "dpo.yaml", dpo, run=str(here / "dpo"), batch={"row_tokens": 600}, **less)),
    ]
    start = make_start(world, cache, tmp_path_factory)
    again = {"model": {"gradient_checkpointing": True}, "batch": {"examples": 2}, "ppo": {"epochs": 2}} | less
    recipes.append((ppo, ppo_recipe(world, start, here / "ppo.yaml", **again)))
    for stage, recipe in recipes:
        told = align(recipe, stage=stage)
        assert (told.status, told.err) == (0, ""), told.err
        assert "dense" not in told.out
    assert 2 <= len(variants) <= 6, len(variants)


def test_without_a_compiler_attention_is_the_dense_one_with_a_remark(variants, monkeypatch):
    def none(*_given):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(flex, "BACKEND", none)
    base = Base(tiny_model("llama"), tiny_tokenizer(), "fingerprint", "tiny", "tiny")
    trunk = Trunk(base, Model(base="tiny", dtype="float32"), Lora(r=4))
    assert trunk.packed
    assert trunk.forest_attention is dense_attention
    assert any("no compiler here" in remark for remark in trunk.remarks)


def test_what_a_gpu_is_offered():
    """All there is; without `models/cpu`, whose modules it fuses and prepares, attention and replayed steps."""
    offered, plain = acceleration.offer(torch.device("cuda")), Offer()
    assert offered.attention is flex.flex_attention
    assert offered.replayed is not plain.replayed
    whole = acceleration.there_is("cpu")
    assert (offered.adopt is not plain.adopt, offered.for_sampling is not plain.for_sampling) == (whole, whole)
