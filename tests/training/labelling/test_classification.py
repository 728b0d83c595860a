"""Figures of a classifier against numbers worked by hand, and against their definitions counted out."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.training.labelling.measures import (
    at_threshold,
    auprc,
    auroc,
    by_class,
    calibration,
    calibration_error,
    confusion,
    measured,
    micro_f1,
    mistakes,
    outcome,
    precision_recall,
    roc,
    softmax,
    threshold_for,
    threshold_of_best_f1,
)

# Three classes: of 4 a, 3 are found; of 3 b, 2; of 2 c, none.
ACTUAL = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
TAKEN = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1])
SCORES, POSITIVE = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])


def near(value: object) -> object:
    return pytest.approx(value, rel=1e-12)


def test_confusion_has_the_truth_in_rows():
    assert confusion(ACTUAL, TAKEN, 3).tolist() == [[3, 1, 0], [1, 2, 0], [1, 1, 0]]


def test_precision_recall_and_f1_of_each_class():
    precision, recall, f1 = by_class(confusion(ACTUAL, TAKEN, 3))
    assert precision.tolist() == near([3 / 5, 2 / 4, 0])  # nothing was taken for c
    assert recall.tolist() == near([3 / 4, 2 / 3, 0])
    assert f1.tolist() == near([6 / 9, 4 / 7, 0])


def test_micro_f1_is_accuracy_where_each_text_has_one_label():
    assert micro_f1(confusion(ACTUAL, TAKEN, 3)) == near(5 / 9)


def test_auroc_counts_pairs_and_ties_by_half():
    assert auroc(SCORES, POSITIVE) == near(3 / 4)  # 0.9 beats both, 0.7 one of two
    assert auroc(np.array([0.5, 0.5, 0.1]), np.array([True, False, False])) == near(3 / 4)
    assert math.isnan(auroc(SCORES, np.ones(4, bool)))


def test_auprc_is_average_precision():
    assert auprc(SCORES, POSITIVE) == near(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert auprc(np.full(4, 0.5), POSITIVE) == near(1 / 2)  # all tied: one threshold, at which half are positive
    assert math.isnan(auprc(SCORES, np.zeros(4, bool)))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_areas_agree_with_their_definitions(rows):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    scores, positive = scores / 5, positive.astype(bool)
    if not (positive.any() and not positive.all()):
        return
    pairs = list(product(scores[positive], scores[~positive]))
    assert auroc(scores, positive) == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    curve = roc(scores, positive)
    assert auroc(scores, positive) == pytest.approx(np.trapezoid(curve.y, curve.x))
    for recall, precision, threshold in zip(*precision_recall(scores, positive), strict=True):
        taken = scores >= threshold
        assert recall == pytest.approx((taken & positive).sum() / positive.sum())
        assert precision == pytest.approx((taken & positive).sum() / taken.sum())


@given(st.permutations(range(9)))
def test_the_order_of_examples_changes_no_digit(order):
    likely = softmax(np.random.default_rng(0).normal(size=(9, 3)))
    order = np.array(order)
    assert measured(likely, ACTUAL, ["a", "b", "c"]) == pytest.approx(
        measured(likely[order], ACTUAL[order], ["a", "b", "c"]), rel=1e-14
    )


def test_softmax_holds_large_scores():
    assert softmax(np.array([[1000.0, 1000.0 - math.log(3)]], np.float32))[0] == pytest.approx([0.75, 0.25], rel=1e-4)


def test_calibration_error_by_hand():
    # Four texts at confidence 0.75 of which two are right, one at 1.0 which is right: (4 * 0.25 + 0) / 5.
    likely = np.array([[0.75, 0.25]] * 4 + [[0.0, 1.0]])
    classes = np.array([0, 0, 1, 1, 1])
    assert calibration_error(likely, classes, bins=4) == near(0.2)
    counts, confidence, hits = calibration(likely, classes, bins=4)
    assert (counts.tolist(), confidence.tolist(), hits.tolist()) == ([0, 0, 4, 1], [0, 0, 3.0, 1.0], [0, 0, 2.0, 1.0])


def test_confidence_that_is_true_has_no_calibration_error():
    likely = np.array([[0.75, 0.25]] * 4)
    assert calibration_error(likely, np.array([0, 0, 0, 1])) == near(0.0)


def test_threshold_has_the_most_recall_at_the_wanted_precision():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.3])
    positive = np.array([True, False, True, True, False])
    chosen = threshold_for(0.75, scores, positive)
    assert chosen == near((0.45, 3 / 4, 1.0))  # halfway between 0.6 and 0.3
    assert threshold_for(0.9, scores, positive) == near((0.85, 1.0, 1 / 3))
    assert threshold_for(0.9, 1 - scores, positive) is None
    found = at_threshold(0.45, np.stack([1 - scores, scores], 1), positive.astype(int))
    assert found == near(
        {"threshold": 0.45, "threshold_precision": 0.75, "threshold_recall": 1.0, "threshold_f1": 6 / 7}
    )


def test_threshold_of_the_best_f1_stands_where_there_is_most_room():
    scores = np.array([0.99, 0.9, 0.6, 0.5, 0.01])
    positive = np.array([True, True, False, True, False])
    # F1: 1/2, 4/5, 2/3, 6/7, 3/4 from the highest score down
    threshold = 1 / (1 + 99**0.5)  # halfway between 0.5 and 0.01 in log-odds
    assert threshold_of_best_f1(scores, positive) == near((threshold, 3 / 4, 1.0))
    # Of equal ranges, the widest: 2/3 between 0.9 and 0.8, and again between 0.5 and 0.2.
    scores, positive = np.array([0.9, 0.8, 0.7, 0.5, 0.2]), np.array([True, False, False, True, False])
    assert threshold_of_best_f1(scores, positive) == near((1 / 3, 1 / 2, 1.0))
    # Ties may leave F1 as it is, 2/3 at 0.8 and at 0.5: then it is one range.
    scores = np.array([0.9, 0.8, *[0.5] * 3, *[0.1] * 6])
    positive = np.array([True, True, True, *[False] * 2, True, *[False] * 5])
    assert threshold_of_best_f1(scores, positive) == near((0.4, 3 / 5, 3 / 4))
    assert threshold_of_best_f1(scores, positive & False) is None
    # Where scores crowd at an end, as those of a classifier that is sure do.
    for scores, positive in (
        (1 - np.array([1e-7, 3e-7, 7e-7, 8e-7]), np.array([True, True, False, False])),
        (np.array([3e-7, 2e-7]), np.array([True, True])),
        (np.array([1.0, 1 - 2**-53]), np.array([True, False])),
        (np.ones(3), np.ones(3, bool)),
    ):
        threshold = threshold_of_best_f1(scores, positive)
        assert ((scores >= threshold.threshold) == positive).all()
        assert threshold[1:] == (1.0, 1.0)


def test_of_two_classes_the_second_is_the_positive_one():
    likely = np.stack([1 - SCORES, SCORES], 1)
    figures = measured(likely, POSITIVE.astype(int), ["ham", "spam"])  # all are taken for spam
    assert figures["accuracy"] == near(0.5)
    assert (figures["precision"], figures["recall"], figures["f1"]) == near((0.5, 1.0, 2 / 3))
    assert figures["macro_f1"] == near(1 / 3)
    assert figures["auroc"] == near(3 / 4)
    assert not any("/" in name for name in figures)


def test_means_over_more_classes_leave_out_those_without_rows():
    likely = np.eye(4)[TAKEN]  # a fourth class that no row has
    figures = measured(likely, ACTUAL, ["a", "b", "c", "d"])
    assert figures["f1"] == figures["macro_f1"] == near((6 / 9 + 4 / 7 + 0) / 3)
    assert figures["recall"] == near((3 / 4 + 2 / 3 + 0) / 3)
    assert figures["f1/b"] == near(4 / 7)


def test_mistakes_come_most_confident_first():
    likely = np.array([[0.6, 0.4], [0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
    classes = np.array([1, 0, 1, 1])
    assert mistakes(likely, classes, 9).tolist() == [1, 3, 0]
    assert mistakes(likely, classes, 1).tolist() == [1]


def test_an_outcome_is_json_even_of_a_side_with_one_class():
    import json

    told = outcome(np.array([[0.9, 0.1]] * 3), np.zeros(3, int), ["ham", "spam"])
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["figures"]["auroc"], told["roc"]) == (None, {})


def test_curves_of_a_large_side_are_thinned_but_keep_their_ends():
    draw = np.random.default_rng(0)
    scores, classes = draw.random(5000), draw.integers(0, 2, 5000)
    x, y = outcome(np.stack([1 - scores, scores], 1), classes, ["a", "b"])["roc"]["b"]
    assert len(x) == len(y) == 200
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
