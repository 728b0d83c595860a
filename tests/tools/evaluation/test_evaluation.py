"""Measures of responses, by numbers worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from align.tools.evaluation.folder import identities, in_words, source_names
from align.tools.evaluation.harness import figures
from align.tools.evaluation.measures import distinct, ratio, repetition
from align.training.bootstrap import Draws, Estimate
from align.training.rollouts.parts import RewardPart


def test_variety_and_repetition():
    assert distinct([[1, 2, 1], [2, 2]], 1) == 2 / 5
    assert distinct([[1, 2, 1], [2, 2]], 2) == 1.0  # 12, 21, 22
    assert distinct([[1, 2], [1, 2]], 2) == 1 / 2
    assert math.isnan(distinct([[1]], 2))
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 7) == 3 / 4
    assert repetition([1, 2, 3]) == 0


def test_a_ratio_is_of_sums():
    found = ratio(np.array([2.0, 30.0, 0.0, 4.0]), np.array([1.0, 10.0, 0.0, 4.0]), Draws(300, 0))
    assert (found.value, found.n) == (36 / 15, 3)
    assert 1 <= found.low < found.value < found.high <= 3


def test_sources_of_one_name_are_numbered():
    assert source_names(["a/talks.jsonl", "b/talks.jsonl.gz", "texts.txt"]) == ["talks_0", "talks_1", "texts"]


def test_what_lm_eval_returns():
    numbers = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    found = figures({"results": {"arc": numbers}, "n-samples": {"arc": {"original": 100, "effective": 20}}})
    assert [*found] == ["lm_eval/arc/acc", "lm_eval/arc/em/strict"]
    assert found["lm_eval/arc/acc"] == pytest.approx((0.5, 0.304, 0.696, 20), abs=1e-3)
    assert math.isnan(found["lm_eval/arc/em/strict"].low)


def test_what_a_score_is_goes_by_content_and_label(tmp_path, monkeypatch):
    """Not by where it lies; the home folder may be written as ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, content in (("one", "a"), ("copy", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(content)

    def identity(**part) -> str:
        return identities([RewardPart(name="gold", **part)])["gold"]

    for kind in ("adapter", "model"):
        one, copy, other = (identity(**{kind: where}) for where in ("~/one", str(tmp_path / "copy"), "~/other"))
        assert one == copy != other
    labelled = [identity(model="owner/judge", **more) for more in ({}, {"label": 0}, {"label": 1})]
    assert len(set(labelled)) == 3


def test_one_prompt_has_no_interval_and_the_screen_says_so():
    metrics = {"kl": Estimate(0.5, math.nan, math.nan, 1), "tokens": Estimate(7.0, 6.0, 8.0, 20)}
    one, many = in_words(metrics, SimpleNamespace(scores={}), {}, None)
    assert one.split() == ["kl", "0.5", "(no", "interval;", "1", "prompt)"]
    assert many.split() == ["tokens", "7", "(6", "to", "8;", "20", "prompts)"]
