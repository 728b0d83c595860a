"""The reference of DPO: the policy's start, however far the policy has gone, and the divergence from it."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from models.tiny import VOCABULARY, stir, tiny_trunk, tree

from align.data.trees import Tree, plant
from align.models.trunk import Trunk
from align.objectives.logprobs import linear_kl
from align.objectives.losses import path_sums
from align.recipe.schema import Lora
from align.training.reference import KnownReference, Mismatched, Reference, _key

PAIRS = [
    t._replace(trained=(np.zeros_like(t.trained[0]), *t.trained[1:]))
    for t in (tree(7, 6, 4, seed=4), tree(3, 3, 2, seed=6), tree(6, 8, 1, seed=7))
]
FOREST = plant(PAIRS)


def start(lora: Lora | None) -> Trunk:
    """A trunk as it is before its first step."""
    trunk = tiny_trunk("gemma2", lora)  # with a softcap and a head tied to its embeddings
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if "lora_B" in name:
                p.zero_()
    return trunk.eval()


def moved(lora: Lora | None) -> tuple[Trunk, Reference, Trunk]:
    """A policy that has been trained, its reference, and its start."""
    policy, before = start(lora), start(lora)
    reference = Reference(policy, None if lora else deepcopy(before).requires_grad_(False))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=draw) * p.requires_grad
    return stir(policy), reference, before


def logits(trunk: Trunk) -> torch.Tensor:
    """Of every label's position, dense."""
    head = trunk.projection()
    raw = trunk.states(FOREST) @ head["weight"].T * head["scale"]
    return head["softcap"] * torch.tanh(raw / head["softcap"])


KINDS = pytest.mark.parametrize("lora", [Lora(r=4, alpha=8), None], ids=["lora", "full"])


@KINDS
def test_the_reference_is_the_start_wherever_the_policy_is(lora):
    policy, reference, before = moved(lora)
    expected = path_sums(before(FOREST), FOREST.path, FOREST.paths)
    found = reference(FOREST)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert (path_sums(policy(FOREST), FOREST.path, FOREST.paths) - found).abs().max() > 0.1
    assert policy(FOREST).requires_grad


@KINDS
def test_the_divergence_is_that_of_the_whole_vocabulary(lora):
    """Each side under its own head: with all weights trained, the policy's is no longer the reference's."""
    policy, reference, before = moved(lora)
    with torch.no_grad():
        reference(FOREST)
        total, count = reference.divergence(FOREST)["kl_per_token"]
        p, q = logits(policy).log_softmax(-1), logits(before).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert count == len(FOREST.labels)
    assert expected.mean() > 0.01
    torch.testing.assert_close(total, expected.sum(), rtol=1e-4, atol=1e-4)


@KINDS
def test_at_the_start_both_are_equal_to_the_last_bit(lora):
    policy = start(lora)
    reference = Reference(policy, None if lora else start(None))
    with torch.no_grad():
        assert torch.equal(reference(FOREST), path_sums(policy(FOREST), FOREST.path, FOREST.paths))
        assert reference.divergence(FOREST)["kl_per_token"][0] == 0


def test_a_divergence_belongs_to_the_batch_last_asked_for():
    _, reference, _ = moved(Lora(r=4))
    reference(FOREST)  # in training nothing is kept
    with torch.no_grad(), pytest.raises(AssertionError, match="asked for its log-probabilities first"):
        reference.divergence(FOREST)


def test_divergence_with_two_heads_and_biases():
    draw = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(5, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    first, second = (
        (torch.randn(11, 8, generator=draw).double(), torch.randn(11, generator=draw).double()) for _ in "ab"
    )
    found = linear_kl(hidden, other, *first, scale=0.7, other_head=second)
    p, q = (
        torch.distributions.Categorical(logits=0.7 * (states @ weight.T + bias))
        for states, (weight, bias) in ((hidden, first), (other, second))
    )
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q))
    assert torch.equal(linear_kl(hidden, hidden, *first, other_head=first), torch.zeros(5).double())


class Rows:
    """Examples as `Examples` shows them."""

    max_length = 1024

    def __init__(self, trees: list[Tree]) -> None:
        self.trees = trees

    def __len__(self) -> int:
        return len(self.trees)

    def tree(self, i: int) -> Tree:
        return self.trees[i]


def test_known_numbers_are_the_targets():
    told = [t._replace(targets=(-1.5 - i, -2.5 - i)) for i, t in enumerate(PAIRS)]
    for packed in (True, False):
        assert KnownReference()(plant(told, packed=packed)).tolist() == [-1.5, -2.5, -2.5, -3.5, -3.5, -4.5]


def test_answers_are_put_to_the_prompt_before_their_own():
    rows = Rows([tree(n, m, seed=n) for n, m in ((3, 4), (5, 2), (6, 7))])
    others = Mismatched(rows, np.array([2, 0, 1]))
    prompts, answers = ([t.segments[i].tolist() for t in rows.trees] for i in (0, 1))
    assert [[s.tolist() for s in others.tree(i).segments] for i in range(len(others))] == [
        [prompts[2], answers[0]], [prompts[0], answers[1]], [prompts[1], answers[2]],
    ]  # fmt: skip
    assert others.lengths.tolist() == [6 + 4, 3 + 2, 5 + 7]
    assert [len(others.tree(i).segments[1]) == others.tree(i).trained[1].size for i in range(3)] == [True] * 3


def test_the_key_is_of_all_that_the_numbers_depend_on():
    """Tokens, which of them are trained, weights and dtype; not the targets, nor the adapter's values."""
    trunk = start(Lora(r=4))
    key = _key(trunk, Rows(PAIRS))
    first = PAIRS[0]
    stem, *branches = first.segments
    other_token = first._replace(segments=((stem + 1) % VOCABULARY, *branches))
    other_marks = first._replace(trained=(first.trained[0], ~first.trained[1], first.trained[2]))
    parted = Tree(*((np.concatenate([a, b[:1]]), b[1:], c) for a, b, c in (first.segments, first.trained)))
    keys = {
        key,
        *(_key(trunk, Rows([t, *PAIRS[1:]])) for t in (other_token, other_marks, parted)),
        _key(trunk, Rows(PAIRS[1:])),
        _key(trunk, Rows(PAIRS[::-1])),
        _key(tiny_trunk("llama", Lora(r=4)), Rows(PAIRS)),
    }
    assert len(keys) == 7
    assert _key(stir(trunk), Rows([t._replace(targets=(1.0, 0.0)) for t in PAIRS])) == key
    trunk.fingerprint = "another"
    assert _key(trunk, Rows(PAIRS)) != key
