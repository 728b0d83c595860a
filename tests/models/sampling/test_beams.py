"""Beam search against transformers' `generate(num_beams=k)`, which is asked one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models.tiny import SPECIAL, VOCABULARY, tiny_trunk

from align.models.sampling.beams import Hypotheses
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.sampling.rows import Response
from align.recipe.schema import Lora

PROMPTS = [np.random.default_rng(n).integers(len(SPECIAL), VOCABULARY, n).astype(np.int32) for n in (7, 3, 12, 1)]
KEYS = [(0, i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def trunk():
    """Unsure of every token, so that searches cross, and every eighth of them ends a turn."""
    trunk = tiny_trunk("llama", Lora(r=4, alpha=8))
    with torch.no_grad():
        trunk.plain.model.norm.weight.mul_(0.5)
    trunk.plain.generation_config.eos_token_id = [*range(5, VOCABULARY, 8)]
    return trunk


def generated(trunk, prompt: np.ndarray, k: int, new: int, **options) -> list[list[int]]:
    """The k best of transformers, without what follows their ends."""
    inputs, ends = torch.from_numpy(prompt).long()[None], sorted(trunk.end_tokens)
    with trunk.generating() as model:
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=k, num_return_sequences=k,
            max_new_tokens=new, pad_token_id=0, eos_token_id=ends, **options,
        )  # fmt: skip
    rows = out[:, len(prompt) :].tolist()
    first = [next((t + 1 for t, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, first, strict=True)]


def searched(trunk, k: int, new: int, **options) -> list[list[Response]]:
    return sample(trunk, PROMPTS, Sampling(new, temperature=0, beams=k, **options), KEYS, samples=k)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 3.0}, {"length_penalty": -1.0}, {"repetition_penalty": 1.3, "min_new": 4}],
    ids=str,
)
def test_the_best_are_those_of_generate(trunk, k, options):
    theirs = {"min_new": "min_new_tokens"}
    named = {theirs.get(name, name): value for name, value in options.items()}
    for prompt, found in zip(PROMPTS, searched(trunk, k, 12, **options), strict=True):
        assert [r.tokens.tolist() for r in found] == generated(trunk, prompt, k, 12, **named)
        assert [r.ended for r in found] == [int(r.tokens[-1]) in trunk.end_tokens for r in found]


def test_searches_differ_from_greedy_end_apart_and_are_cut_off(trunk):
    """What the oracle above is asked is not trivial."""
    best = [row[0] for row in searched(trunk, 5, 12)]
    (greedy,) = zip(*sample(trunk, PROMPTS, Sampling(12, temperature=0), KEYS), strict=True)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(best, greedy, strict=True))
    every = [r for options in ({}, {"length_penalty": -1.0}) for row in searched(trunk, 5, 12, **options) for r in row]
    assert {r.ended for r in every} == {True, False}
    assert len({len(r.tokens) for r in every if r.ended}) > 2


def test_k_go_on_where_most_tokens_end(trunk, monkeypatch):
    ends = [token for token in range(VOCABULARY) if token % 4]
    monkeypatch.setattr(trunk.plain.generation_config, "eos_token_id", ends)
    for prompt, found in zip(PROMPTS, searched(trunk, 5, 12, length_penalty=3.0), strict=True):
        assert [r.tokens.tolist() for r in found] == generated(trunk, prompt, 5, 12, length_penalty=3.0)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_families_too(family):
    """Windows and soft caps; learned positions."""
    trunk = tiny_trunk(family, Lora(r=4, alpha=8))
    for prompt, found in zip(PROMPTS, searched(trunk, 3, 8), strict=True):
        assert [r.tokens.tolist() for r in found] == generated(trunk, prompt, 3, 8)


def test_a_stop_text_ends_a_response(trunk):
    free = searched(trunk, 3, 6, min_new=6)[0][0]
    text = trunk.tokenizer.decode(free.tokens[2:4])
    stopped = searched(trunk, 3, 6, stop=(text,))[0]
    assert any(r.ended and trunk.tokenizer.decode(r.tokens).endswith(text) for r in stopped)
    assert all(text not in trunk.tokenizer.decode(r.tokens[:-1]) for r in stopped)


def test_responses_do_not_depend_on_their_neighbours(trunk, monkeypatch):
    together = searched(trunk, 3, 8)
    monkeypatch.setattr(trunk, "budgets", trunk.budgets.asked(1))  # every prompt alone
    alone = searched(trunk, 3, 8)
    assert [[r.tokens.tolist() for r in row] for row in alone] == [[r.tokens.tolist() for r in row] for row in together]


def test_hypotheses_by_hand():
    def of(length: int) -> Response:
        return Response(np.zeros(length, np.int32), True)

    kept = Hypotheses(2, 1.0)
    kept.add(-4.0, of(2))  # -2 a token
    assert kept.improvable(-1e6, 3), "there is room yet"
    kept.add(-3.0, of(3))  # -1
    assert [worth for worth, _ in kept.best] == [-1, -2]
    assert kept.improvable(-5.9, 3)
    assert not kept.improvable(-6.0, 3)
    kept.add(-6.0, of(4))  # -1.5
    assert [len(response.tokens) for _, response in kept.best] == [3, 4]
    assert Hypotheses(1, 0.0)._worth(-7.0, 5) == -7
