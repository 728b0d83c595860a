"""Pairs drawn from a policy's own responses: the law of their winners, and what is left out."""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import pytest

from align.data.formats.prompts import Asked
from align.recipe.errors import UserError
from align.tools.evaluation.drawn_pairs import check_conversations, drawn_pairs
from align.tools.evaluation.generation import Responses
from align.training.bootstrap import Draws
from align.training.rollouts.parts import Answered


def given(scores, texts=None, ended=None, **record) -> tuple[list[Asked], list[str], Responses]:
    """Prompts by number, with samples of these scores (n, s)."""
    scores = np.asarray(scores, np.float64)
    n, samples = scores.shape
    rows = [Asked(record, [{"role": "user", "content": f"q{i}"}], None) for i in range(n)]
    texts = texts or [[f"sample {j} of {i}" for j in range(samples)] for i in range(n)]
    answered = [Answered(row, "", text) for row, own in zip(rows, texts, strict=True) for text in own]
    figures = {"ended": np.ones_like(scores) if ended is None else np.asarray(ended, np.float64)}
    keys = [blake2b(str(i).encode(), digest_size=8).hexdigest() for i in range(n)]
    return rows, keys, Responses(None, answered, figures, {"gold": scores})


@pytest.mark.parametrize("margin", [0.0, 1.0, -2.5])
def test_winners_follow_bradley_and_terry(margin):
    """4,000 pairs, whose first response is better by the margin."""
    pairs = drawn_pairs(*given([[margin, 0.0] * 2] * 2000), "gold", seed=5)
    won = np.mean([row["chosen"].startswith(("sample 0", "sample 2")) for row in pairs.rows])
    law = 1 / (1 + math.exp(-margin))
    assert abs(won - law) < 4 * math.sqrt(law * (1 - law) / 4000)
    right = {0.0: 0.5, 1.0: won, -2.5: 1 - won}[margin]
    assert pairs.accuracy(Draws(200, 0)).value == pytest.approx(right)


def test_pairs_are_disjoint_and_an_odd_sample_is_in_none():
    pairs = drawn_pairs(*given([[1.0, 2.0, 3.0, 4.0, 5.0]]), "gold", seed=0)
    assert [{row["chosen"], row["rejected"]} for row in pairs.rows] == [
        {"sample 0 of 0", "sample 1 of 0"},
        {"sample 2 of 0", "sample 3 of 0"},
    ]
    assert [row["messages"] for row in pairs.rows] == [[{"role": "user", "content": "q0"}]] * 2
    assert pairs.counts.tolist() == [2]


def test_a_winner_depends_on_seed_prompt_and_number_alone():
    """On neither the prompts beside it, nor pairs of it that are left out, nor samples after it."""
    rows, keys, responses = given([[0.0] * 8] * 40)
    all_of_them = drawn_pairs(rows, keys, responses, "gold", seed=3).rows
    _, _, fewer = given([[0.0] * 6] * 40, ended=[[0, 1, 1, 1, 1, 1]] * 40)
    some = drawn_pairs(rows[::-1], keys[::-1], fewer._replace(answered=_turned(fewer.answered, 6)), "gold", seed=3)
    by_prompt = [all_of_them[4 * i : 4 * i + 4] for i in range(40)]
    assert some.rows == [row for four in by_prompt[::-1] for row in four[1:3]]
    assert some.left_out["cut off"] == 40
    assert drawn_pairs(rows, keys, responses, "gold", seed=4).rows != all_of_them


def _turned(answered, samples):
    """The same responses, prompts in the opposite order."""
    return [one for i in range(len(answered) - samples, -1, -samples) for one in answered[i : i + samples]]


def test_what_is_no_pair_is_left_out_and_counted():
    texts = [["a", " a\n"], ["a", "b"], ["", "b"], ["a", "b"], ["a", "b"]]
    scores = [[1, 1], [1, math.nan], [1, 2], [1, 2], [1, 1]]
    ended = [[1, 1], [1, 1], [1, 1], [1, 0], [1, 1]]
    pairs = drawn_pairs(*given(scores, texts, ended), "gold", seed=0)
    assert pairs.left_out == {"equal": 1, "without a score": 1, "empty": 1, "cut off": 1}
    assert (len(pairs.rows), pairs.counts.tolist(), pairs.as_scored.sum()) == (1, [0, 0, 0, 0, 1], 0.5)


def test_tools_of_a_prompt_stay_with_it():
    tools = [{"name": "look_up"}]
    (row,) = drawn_pairs(*given([[1.0, 2.0]], tools=tools), "gold", seed=0).rows
    assert row["tools"] == tools


def test_beginnings_of_texts_are_no_conversations():
    rows = [Asked({}, None, "Once upon"), Asked({}, [{"role": "user", "content": "q"}], None)]
    with pytest.raises(UserError, match=r"evaluate\.preferences: 1 of 2 prompts are beginnings of texts"):
        check_conversations(rows)
    check_conversations(rows[1:])
