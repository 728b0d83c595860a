"""What each step sees, and how fast it learns, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.recipe.schema import BaseRecipe, Batch, Data, Model, Optim, Source, Train
from align.training.plan import Plan, learning_rate


class Shuffled:
    """Ten examples in an order that depends on seed and epoch."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(self.size)


def plan(*, size: int = 10, per_step: int = 4, seed: int = 3, **train) -> Plan:
    recipe = BaseRecipe(
        stage="sft",
        run="runs/x",
        seed=seed,
        model=Model(base="x"),
        data=Data(train=[Source(path="x")]),
        batch=Batch(examples=per_step),
        train=Train(**train),
    )
    return Plan(recipe, Shuffled(size))


def stream(plan: Plan) -> list[int]:
    return [int(i) for step in range(1, plan.steps + 1) for i in plan.batch(step)]


def epochs(*numbers: int, seed: int = 3) -> list[int]:
    return [int(i) for number in numbers for i in Shuffled().order(seed, number)]


def test_steps_cut_the_stream_of_epochs_in_order():
    two = plan(epochs=2.0)
    assert two.steps == 5
    assert stream(two) == epochs(0, 1)
    assert list(two.batch(3)) == epochs(0)[8:] + epochs(1)[:2]  # over the seam
    assert two.epoch(5) == 2.0
    assert two.epoch(1) == 0.4


def test_only_the_last_step_is_short():
    one = plan()
    assert [len(one.batch(step)) for step in range(1, one.steps + 1)] == [4, 4, 2]
    assert stream(one) == epochs(0)
    assert one.epoch(3) == 1.0


@pytest.mark.parametrize(("passes", "examples", "steps"), [(0.5, 5, 2), (0.01, 1, 1), (2.55, 26, 7), (1.0, 10, 3)])
def test_fractions_of_epochs(passes, examples, steps):
    part = plan(epochs=passes)
    assert part.steps == steps
    assert stream(part) == epochs(0, 1, 2)[:examples]


def test_steps_instead_of_epochs_are_whole():
    asked = plan(steps=7, epochs=1.0)
    assert asked.steps == 7
    assert stream(asked) == epochs(0, 1, 2)[:28]
    assert asked.epoch(7) == 2.8


def test_a_step_larger_than_the_data_takes_several_epochs():
    large = plan(per_step=25, steps=2)
    assert stream(large) == epochs(0, 1, 2, 3, 4)


def test_a_batch_is_the_same_whichever_was_asked_before():
    forward, single = plan(epochs=3.0), plan(epochs=3.0)
    batches = [forward.batch(step) for step in range(1, forward.steps + 1)]
    for step in (7, 1, 5):
        assert list(single.batch(step)) == list(batches[step - 1])
    assert stream(plan(seed=4)) == epochs(0, seed=4)


def rates(steps: int, **optim) -> list[float]:
    settings = Optim(learning_rate=1.0, **optim)
    return [learning_rate(settings, step, steps) for step in range(1, steps + 1)]


def test_constant():
    assert rates(3, schedule="constant", warmup=0.0) == [1, 1, 1]


def test_warm_up_rises_to_the_peak():
    assert rates(5, schedule="constant", warmup=3.0) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(10, schedule="constant", warmup=0.2)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_linear_falls_evenly_and_never_trains_a_step_at_nothing():
    assert rates(4, schedule="linear", warmup=0.0) == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="linear", warmup=0.0, min_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert rates(6, schedule="linear", warmup=2.0) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_cosine():
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine", warmup=0.0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert rates(4, schedule="cosine", warmup=0.0, min_ratio=0.5)[2] == pytest.approx(0.75)


def test_a_run_shorter_than_its_warm_up_still_learns():
    assert rates(2, schedule="cosine", warmup=8.0) == pytest.approx([1 / 9, 2 / 9])
    assert rates(1, schedule="cosine") == [1]
