"""KTO through the command: every figure as plain transformers computes it, with a baseline of the whole step."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from plain import Policy
from test_dpo import BETA, assert_same, train
from world import lines, metrics, write_rows


@pytest.mark.parametrize("weights_of", [(1.5, 0.5), pytest.param((1.0, 1.0), marks=pytest.mark.slow)], ids=str)
def test_kto_is_the_equation_of_its_paper(world, here, weights_of):
    """With z0 over all held-out answers, each put to the prompt before its own."""
    section = {"loss": "kto", "desirable_weight": weights_of[0], "undesirable_weight": weights_of[1]}
    run = train(world, here, dpo=section, train={"steps": 4, "eval_every": None})
    rows = lines(world.held_verdicts)
    policy = Policy.load(run / "final", world.base)
    answers = [policy.says(row["prompt"], row["completion"]) for row in rows]
    others = [
        policy.says(row["prompt"], other["completion"]) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    z0 = max(0.0, fmean(a.policy - a.reference for a in others))
    signed = [(a.policy - a.reference - z0) * (1 if row["label"] else -1) for a, row in zip(answers, rows, strict=True)]
    weighed = [weights_of[0] if row["label"] else weights_of[1] for row in rows]
    good, bad = ([a for a, row in zip(answers, rows, strict=True) if row["label"] is label] for label in (True, False))
    before, after = metrics(run, "eval")
    assert z0 > 0
    assert_same(
        after,
        {
            "loss": fmean(w / (1 + math.exp(BETA * s)) for w, s in zip(weighed, signed, strict=True)),
            "kl_baseline": z0,
            "rewards/desirable": BETA * fmean(a.policy - a.reference for a in good),
            "rewards/undesirable": BETA * fmean(a.policy - a.reference for a in bad),
            "nll_per_token/desirable": -sum(a.policy for a in good) / sum(a.tokens for a in good),
            "nll_per_token/undesirable": -sum(a.policy for a in bad) / sum(a.tokens for a in bad),
            "kl_per_token": sum(a.kl for a in answers) / sum(a.tokens for a in answers),
        },
    )
    assert before["loss"] == fmean(weighed) / 2
    assert after["rewards/desirable"] > after["rewards/undesirable"]


def test_kto_without_another_kind_or_another_answer(world, here):
    """Steps of two may hold one kind alone: of the other nothing is told, and never NaN. A single row has no z0."""
    one = write_rows(here / "one.jsonl", lines(world.held_verdicts)[:1])
    data = {"eval": {"sources": [{"path": str(one)}]}}
    run = train(world, here, dpo={"loss": "kto"}, batch={"examples": 2}, data=data, train={"steps": 6})
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    kinds = [sum(name.startswith("rewards/") for name in record) for record in metrics(run, "train")]
    assert set(kinds) == {1, 2}
    before, *_, after = metrics(run, "eval")
    assert {name for name in after if name.startswith("rewards/")} == {"rewards/desirable"}
    assert (before["loss"], after["kl_baseline"]) == (0.5, 0.0)
    assert after["loss"] == pytest.approx(1 / (1 + math.exp(after["rewards/desirable"])), rel=1e-5)
    assert after["rewards/desirable"] != 0
