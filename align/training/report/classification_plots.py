"""A classifier's part of the run's report, drawn from its classification.json.

`classification_section(results)` is one piece of HTML for the page of report.html.jinja: its style and its variables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from align.training.labelling.measures import by_class
from align.training.report.plots import COLOURS, GRID, SERIES, Panel, new_axes, pages, svg_of, value

SHOWN = (  # figures of the headline, where there are such
    ("accuracy", "Accuracy"), ("f1", "F1"), ("macro_f1", "Macro F1"), ("precision", "Precision"), ("recall", "Recall"),
    ("auroc", "AUROC"), ("auprc", "AUPRC"), ("calibration_error", "Calibration error"),
)  # fmt: skip


def classification_section(results: dict[str, Any]) -> Markup:
    """Confusion matrix, curves, calibration and mistakes of each held-out side; nothing for an empty dict."""
    if not results:
        return Markup()
    labels, threshold = results["labels"], results["threshold"]
    splits = {
        name: {
            "examples": side["examples"],
            "facts": _facts(side["figures"], labels, threshold if name == "eval" else None),
            "confusion": _cells(np.array(side["confusion"]), labels),
            "precision": [value(p) for p in by_class(np.array(side["confusion"]))[0]],
            "panels": panels(side),
            "mistakes": [row for row in results["mistakes"] if row["split"] == name],
        }
        for name, side in results["splits"].items()
    }
    page = pages().get_template("classification.html.jinja")
    return Markup(page.render(labels=labels, splits=splits))


def panels(side: dict[str, Any]) -> list[Panel]:
    """ROC and precision-recall curves of every class that is drawn, and the reliability diagram."""
    drawn = [
        _unit_panel("ROC", "false positive rate", "true positive rate", side["roc"], diagonal=True),
        _unit_panel("Precision and recall", "recall", "precision", side["precision_recall"], diagonal=False),
    ]
    bins = {name: np.array(numbers) for name, numbers in side["calibration"].items()}
    full = bins["counts"] > 0
    if full.any():
        counts = bins["counts"][full]
        curve = {"texts by confidence": [bins["confidence"][full] / counts, bins["hits"][full] / counts]}
        drawn.append(_unit_panel("Calibration", "confidence", "accuracy", curve, diagonal=True, dots=True))
    return [panel for panel in drawn if panel.svg]


def _unit_panel(
    title: str, across: str, up: str, curves: dict[str, Any], *, diagonal: bool, dots: bool = False
) -> Panel:
    """Curves in the unit square; `diagonal` marks chance, or perfect calibration."""
    captions = [f"{label}: {up} over {across}" for label in curves]
    if not curves:
        return Panel(title, None, captions)
    figure, axes = new_axes()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if diagonal:
        axes.plot([0, 1], [0, 1], color=GRID, lw=1.5)
    for i, (x, y) in enumerate(curves.values()):
        mark = {"marker": "o", "markersize": 4} if dots else {}
        axes.plot(x, y, color=SERIES[i % COLOURS], lw=1.6, **mark)
    return Panel(title, svg_of(figure, f"{title}. {up} over {across}"), captions)


def _facts(figures: dict[str, float | None], labels: list[str], threshold: dict[str, float] | None) -> list[dict]:
    of = f"of {labels[1]}" if len(labels) == 2 else "mean over classes"
    general = ("accuracy", "macro_f1", "calibration_error")
    facts = [
        {"label": label, "value": value(figures[name]), "note": "" if name in general else of}
        for name, label in SHOWN
        if figures.get(name) is not None and not (name == "macro_f1" and len(labels) > 2)
    ]
    if threshold:
        note = f"of {labels[1]}: precision {value(threshold['precision'])}, recall {value(threshold['recall'])}"
        facts.append({"label": "Threshold chosen here", "value": value(threshold["threshold"]), "note": note})
    return facts


def _cells(matrix: np.ndarray, labels: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each label with its row: counts, shaded by their share of the row."""
    recall = by_class(matrix)[1]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    return [
        (
            label,
            {
                "cells": [
                    {"count": int(n), "right": i == j, "strength": round(60 * float(shares[i, j]))}
                    for j, n in enumerate(row)
                ],
                "recall": value(recall[i]),
            },
        )
        for i, (label, row) in enumerate(zip(labels, matrix, strict=True))
    ]
