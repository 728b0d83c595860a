"""align.evaluate through its command: on a task whose responses can be listed, and as align.compare reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from enumerable import divergence, every_response, make_base
from policies import evaluated, evaluation, make_costs, make_policy, results
from world import align, tree, write_rows

from align import compare, evaluate

ASKED = {"a": 3, "b": 4, "c": 5, "ask": 6}  # prompts of one word, and its token
RULE = {"scores": [{"function": "enumerable:reward", "name": "gold"}]}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A base that knows seven words, prompts, and a policy that has gone some way."""
    folder = tmp_path_factory.mktemp("words")
    write_rows(folder / "prompts.jsonl", [{"text": word} for word in ASKED])
    base = make_base(folder / "base")
    return base, folder / "prompts.jsonl", make_policy(base, folder / "dpo run")


def asking(**section):
    return {"samples": 2, "generation": {"max_new": 3}} | RULE | section


def test_reward_and_kl_are_the_exact_ones_within_the_intervals(words, here):
    base, data, policy = words
    about, rows = evaluated(here / "run", base, data, policy, evaluate=asking(samples=400))
    exact = {word: (every_response(base, policy / "", token), every_response(base, None, token)) for word, token in ASKED.items()}
    worth = {word: float((p.logprobs.exp() * p.rewards).sum()) for word, (p, _) in exact.items()}
    kls = {word: divergence(p.logprobs, ref.logprobs) for word, (p, ref) in exact.items()}
    assert min(kls.values()) > 0.05
    for name, truth in (("score/gold", worth), ("kl", kls), ("kl_sequence", kls)):
        found = about["metrics"][name]
        assert found["low"] < np.mean([*truth.values()]) < found["high"], name
        assert found["n"] == 4
    for i, word in enumerate(ASKED):  # and prompt by prompt, where chance is only that of the samples
        own = [row for row in rows if row["prompt"] == i]
        assert own[0]["prompt_text"] == word
        for truth, drawn in (
            (worth[word], [row["scores"]["gold"] for row in own]),
            (kls[word], [row["kl"] for row in own]),
            (kls[word], [row["logprob"] - row["ref_logprob"] for row in own]),
        ):
            assert abs(np.mean(drawn) - truth) < 4 * np.std(drawn) / 20
        known = exact[word][0].logprobs
        assert all(np.abs(known - row["logprob"]).min() < 1e-4 for row in own)
