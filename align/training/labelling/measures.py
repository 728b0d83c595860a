"""How good a classifier is: pure functions of the scores and classes of a whole side, gathered before.

Nothing is averaged over batches, so no figure depends on their size or on the number of processes. Where two classes
are told apart, the *positive* one is the second.

Shapes: n examples, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

BINS = 15  # of confidence, as in Guo et al. 2017


class Curve(NamedTuple):
    """A curve over all thresholds that tell examples apart, the highest first."""

    x: np.ndarray  # (k,) float64
    y: np.ndarray  # (k,) float64
    thresholds: np.ndarray  # (k,) float64: predicted positive where the probability is at least this


class Threshold(NamedTuple):
    """From which probability on an example counts as positive, and what that gives on the rows it was chosen on."""

    threshold: float
    precision: float
    recall: float


def softmax(scores: np.ndarray) -> np.ndarray:
    """(n, C) scores -> (n, C) float64 probabilities."""
    assert scores.ndim == 2
    powers = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def measured(probabilities: np.ndarray, classes: np.ndarray, labels: list[str]) -> dict[str, float]:
    """All figures of one side, by name.

    `f1`, `precision`, `recall`, `auroc` and `auprc` are the positive class's where there are two, else means over the
    classes (`macro_f1` always is one; `micro_f1` pools all decisions, and equals accuracy where each text has one
    label). With more than two, each class has `f1/<label>` and so on.
    """
    n, count = probabilities.shape
    assert classes.shape == (n,)
    assert len(labels) == count
    matrix = confusion(classes, probabilities.argmax(1), count)
    precision, recall, f1 = by_class(matrix)
    figures = {"accuracy": float(matrix.trace() / n) if n else float("nan")}
    each = {"precision": precision, "recall": recall, "f1": f1}
    each["auroc"] = np.array([auroc(probabilities[:, c], classes == c) for c in range(count)])
    each["auprc"] = np.array([auprc(probabilities[:, c], classes == c) for c in range(count)])
    present = matrix.sum(1) > 0  # a class that no row has is no part of a mean
    for name, values in each.items():
        figures[name] = float(values[1]) if count == 2 else _mean(values[present])
    figures |= {"macro_f1": _mean(f1[present]), "micro_f1": micro_f1(matrix)}
    figures["calibration_error"] = calibration_error(probabilities, classes)
    if count > 2:
        figures |= {f"{name}/{label}": float(v) for name in each for label, v in zip(labels, each[name], strict=True)}
    return figures


def confusion(classes: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """(count, count) int64, how many of class [row] were taken for class [column]."""
    assert classes.ndim == 1
    assert classes.shape == predicted.shape
    return np.bincount(classes * count + predicted, minlength=count * count).reshape(count, count)


def by_class(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of every class, each (C,); 0 where nothing was predicted, or nothing was there."""
    hits, actual, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return _ratio(hits, predicted), _ratio(hits, actual), _ratio(2 * hits, actual + predicted)


def micro_f1(matrix: np.ndarray) -> float:
    """F1 of all decisions of all classes together."""
    hits = matrix.trace()
    wrong = matrix.sum() - hits  # each a false positive of one class and a false negative of another
    return float(_ratio(np.array(2 * hits), np.array(2 * hits + 2 * wrong)))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """How often a positive example scores above a negative one, a tie counting half; nan without both.

    The rank statistic of Mann and Whitney, which is the area under the ROC curve (Hanley & McNeil 1982).
    """
    assert scores.ndim == 1
    assert scores.shape == positive.shape
    p, n = int(positive.sum()), int((~positive).sum())
    if not (p and n):
        return float("nan")
    _, which, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(sizes) - (sizes - 1) / 2  # from 1; ties share their mean
    return float((ranks[which][positive].sum() - p * (p + 1) / 2) / (p * n))


def auprc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision, sum of precision times the step in recall over all thresholds; nan without positives."""
    curve = precision_recall(scores, positive)
    return float((np.diff(curve.x, prepend=0.0) * curve.y).sum()) if positive.any() else float("nan")


def roc(scores: np.ndarray, positive: np.ndarray) -> Curve:
    """False positive rate against true positive rate, from (0, 0)."""
    thresholds, hits, taken = _taken(scores, positive)
    false = _ratio(taken - hits, np.full(len(hits), (~positive).sum()))
    true = _ratio(hits, np.full(len(hits), positive.sum()))
    return Curve(np.append(0.0, false), np.append(0.0, true), np.append(np.inf, thresholds))


def precision_recall(scores: np.ndarray, positive: np.ndarray) -> Curve:
    """Recall against precision, at every threshold."""
    thresholds, hits, taken = _taken(scores, positive)
    return Curve(_ratio(hits, np.full(len(hits), positive.sum())), _ratio(hits, taken), thresholds)


def threshold_for(precision: float, scores: np.ndarray, positive: np.ndarray) -> Threshold | None:
    """The threshold with most recall among those of at least this precision; None where there is none.

    It stands halfway to the next lower score, so that it does not hang on the last digit of one example.
    """
    curve = precision_recall(scores, positive)
    good = np.flatnonzero((curve.y >= precision) & (curve.x > 0))
    if not len(good):
        return None
    best = good[-1]  # recall never falls along the curve
    below = curve.thresholds[best + 1] if best + 1 < len(curve.thresholds) else 0.0
    return Threshold(float((curve.thresholds[best] + below) / 2), float(curve.y[best]), float(curve.x[best]))


def threshold_of_best_f1(scores: np.ndarray, positive: np.ndarray) -> Threshold | None:
    """The threshold on probabilities whose F1 is the best; None without positives.

    A whole range of thresholds has it. Of all such ranges it stands in the one that is widest in log-odds, in the
    middle, where scores that are a little different from these change least.
    """
    if not positive.any():
        return None
    values, hits, taken = _taken(scores, positive)
    f1 = _ratio(2 * hits, taken + positive.sum())
    inside = np.clip(values, 1e-300, 1 - 2**-53)
    odds = np.log(inside) - np.log1p(-inside)
    tops, bottoms = odds, np.append(odds[1:], min(odds[-1] - 1, -14.0))  # between which it may stand, for each F1
    best = np.flatnonzero(f1 == f1.max())
    ranges = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(ranges, key=lambda those: tops[those[0]] - bottoms[those[-1]])
    threshold = float(1 / (1 + np.exp(-(tops[widest[0]] + bottoms[widest[-1]]) / 2)))
    last = int((values >= threshold).sum()) - 1
    if last not in widest:  # scores so near to each other, or to 1, that nothing lies between
        last = int(widest[-1])
        threshold = float(values[last])
    return Threshold(threshold, float(hits[last] / taken[last]), float(hits[last] / positive.sum()))


def at_threshold(threshold: float, probabilities: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """What a threshold on the positive class's probability gives, (n, 2) probabilities and (n,) classes."""
    matrix = confusion(classes, (probabilities[:, 1] >= threshold).astype(int), 2)
    figures = zip(("precision", "recall", "f1"), by_class(matrix), strict=True)
    return {"threshold": threshold} | {f"threshold_{name}": float(values[1]) for name, values in figures}


def calibration(probabilities: np.ndarray, classes: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, ...]:
    """By confidence in the predicted class, in bins of equal width: examples, sum of confidence, hits; each (bins,)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == classes
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (0, 1/bins], …
    counts = np.bincount(which, minlength=bins)
    return counts, np.bincount(which, confidence, bins), np.bincount(which, right, bins)


def calibration_error(probabilities: np.ndarray, classes: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean |accuracy - confidence| over bins, weighted by their examples.

    Guo et al. 2017, arXiv 1706.04599.
    """
    counts, confidence, hits = calibration(probabilities, classes, bins)
    return float(np.abs(hits - confidence).sum() / counts.sum()) if counts.sum() else float("nan")


def outcome(probabilities: np.ndarray, classes: np.ndarray, labels: list[str], points: int = 200) -> dict[str, Any]:
    """What a report draws of one side, as JSON holds it: figures, confusion, curves of each class, calibration."""
    drawn = [1] if len(labels) == 2 else range(len(labels))
    curves = {"roc": {}, "precision_recall": {}}
    for c in drawn:
        positive = classes == c
        if positive.any() and not positive.all():
            for name, curve in (("roc", roc), ("precision_recall", precision_recall)):
                x, y, _ = curve(probabilities[:, c], positive)
                kept = np.unique(np.linspace(0, len(x) - 1, points).round().astype(int))
                curves[name][labels[c]] = [x[kept].tolist(), y[kept].tolist()]
    counts, confidence, hits = calibration(probabilities, classes)
    return {
        "examples": len(classes),
        "figures": {k: v if np.isfinite(v) else None for k, v in measured(probabilities, classes, labels).items()},
        "confusion": confusion(classes, probabilities.argmax(1), len(labels)).tolist(),
        **curves,
        "calibration": {"counts": counts.tolist(), "confidence": confidence.tolist(), "hits": hits.tolist()},
    }


def mistakes(probabilities: np.ndarray, classes: np.ndarray, most: int) -> np.ndarray:
    """(≤ most,) int64, wrongly classified examples, the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != classes)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]


def _taken(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores, highest first; how many positives, and how many in all, score at least as much."""
    assert scores.ndim == 1
    assert scores.shape == positive.shape
    values, which = np.unique(scores, return_inverse=True)
    taken = np.bincount(which, minlength=len(values))[::-1].cumsum()
    hits = np.bincount(which[positive], minlength=len(values))[::-1].cumsum()
    return values[::-1].astype(np.float64), hits, taken


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where whole is."""
    return np.divide(part, whole, out=np.zeros(np.shape(part), np.float64), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
