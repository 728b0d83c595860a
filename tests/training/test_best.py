"""Which evaluation is the best, and when a run no longer gains: by hand-worked sequences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from align.data.examples import Examples
from align.recipe.errors import UserError
from align.recipe.schema import Source
from align.recipe.train import Train
from align.training import best
from align.training.sources import titled, with_sources


class Run:
    """Of a loop, what the choice of the best looks at; `published` are the steps that were kept."""

    def __init__(self, metric: str = "loss", goal: str = "least", patience: int | None = None, budget=math.inf) -> None:
        train = Train(eval_every=1, best={"metric": metric, "goal": goal}, patience=patience)
        self.recipe = SimpleNamespace(train=train)
        self.plan, self.run = SimpleNamespace(steps=99), SimpleNamespace(folder=Path("run"))
        self.algorithm = SimpleNamespace(
            may_be_best=lambda figures: figures.get("kl", 0.0) <= budget, described=lambda loop, last: {"last": last}
        )
        self.memory, self.step, self.published = {}, 0, []

    def publish(self, folder: Path, about: dict) -> None:
        assert folder == Path("run/best")
        self.published.append(about)

    def at(self, step: int, measured: bool = True, **figures) -> bool:
        """Evaluate; whether the run is over. The memory goes through JSON, as a checkpoint's does."""
        self.step, self.memory = step, json.loads(json.dumps(self.memory))
        best.judged(self, {"step": step, "split": "eval", **figures}, measured)
        return best.over(self)


def test_the_least_and_the_greatest_are_kept_and_the_first_step_does_not_count():
    course = [0.5, 3.0, 2.0, 2.5, 2.0, 1.0]
    low, high = Run(), Run(goal="greatest")
    for step, loss in enumerate(course):
        low.at(step, loss=loss)
        high.at(step, loss=loss)
    assert [about["step"] for about in low.published] == [1, 2, 5], "of equal ones the earlier is kept"
    assert low.memory["best"] == {"step": 5, "loss": 1.0}
    assert [about["step"] for about in high.published] == [1]
    assert low.published[-1] == {"step": 5, "loss": 1.0, "last": False}


def test_patience_counts_evaluations_in_a_row_once_each():
    run = Run(patience=2)
    assert not run.at(0, loss=1.0)
    assert [run.at(step, loss=loss) for step, loss in ((1, 5.0), (2, 6.0), (3, 4.0), (4, 4.0))] == [False] * 4
    assert not run.at(4, loss=4.0), "done again after a resume"
    assert run.at(5, loss=4.5)
    assert best.told(run) == {"best": {"step": 3, "loss": 4.0}, "ended_by": {"patience": 2, "of_steps": 99}}
    told = best.in_words(run)
    assert told == "no gain in loss in 2 evaluations (since step 3, the best): it ended after step 5 of 99"
    run.step = 99
    assert "ended_by" not in best.told(run)


def test_what_may_not_be_kept_or_is_no_number_is_no_gain():
    run = Run("score", "greatest", patience=3, budget=1.0)
    assert not run.at(1, score=9.0, kl=1.5)
    assert not run.at(2, score=None, kl=0.5)
    assert run.published == []
    assert run.at(3, score=math.nan, kl=0.5)
    assert best.in_words(run).startswith("no gain in score in 3 evaluations (none may be kept)")
    assert not run.at(4, score=1.0, kl=1.0)
    assert run.memory["best"] == {"step": 4, "score": 1.0, "kl": 1.0}


@pytest.mark.parametrize("broken", ["loss", "kl"])
def test_weights_that_give_no_number_are_never_the_best(broken):
    """What they say may still score well."""
    run = Run("score", "greatest")
    run.at(1, score=9.0, **{broken: math.nan})
    assert run.published == []
    run.at(2, score=1.0, **{broken: 1.0})
    assert [about["step"] for about in run.published] == [2]


def test_evaluations_without_answers_do_not_count():
    run = Run("generate/ended", "greatest", patience=1)
    assert not run.at(1, **{"generate/ended": 0.5})
    assert not run.at(2, measured=False, loss=1.0)
    assert run.at(3, **{"generate/ended": 0.5})


def test_a_name_that_no_evaluation_has_is_refused_before_the_first_step():
    figures = {"loss": 1.0, "accuracy": 0.5, "accuracy_low": 0.1, "margin_share": [0.5, 0.5]}
    with pytest.raises(UserError, match=r"'acuracy'; did you mean 'accuracy'\? There are loss, accuracy$"):
        Run("acuracy").at(0, **figures)
    with pytest.raises(UserError, match="no figure of an evaluation is 'margin_share'"):
        Run("margin_share").at(0, **figures)


def test_titles_group_the_numbers_of_examples():
    """Three sources, two of which share a title."""
    sources = [Source(path="a", title="x"), Source(path="b"), Source(path="c", title="x"), Source(path="d", title="y")]
    parts = [SimpleNamespace(source=s, rows=np.arange(n)) for s, n in zip(sources, (2, 1, 3, 0), strict=True)]
    held = SimpleNamespace(parts=parts, starts=np.cumsum([0, 2, 1, 3, 0]))
    assert {title: numbers.tolist() for title, numbers in titled(held).items()} == {"x": [0, 1, 3, 4, 5], "": [2]}
    assert titled(Examples([], 8)) == {}


def test_names_of_a_sources_figures():
    of_all = {"loss": 1.0, "loss/sampled": 0.5, "accuracy_low": 0.2}
    found = with_sources(of_all, {"wiki": {"loss": 2.0, "accuracy_low": 0.1, "margin_share": [1.0]}})
    assert found == of_all | {"loss/wiki": 2.0, "accuracy/wiki_low": 0.1}
    with pytest.raises(UserError, match="the title 'sampled' would give two figures the name 'loss/sampled'"):
        with_sources(of_all, {"sampled": {"loss": 2.0}})
