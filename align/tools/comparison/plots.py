"""A comparison drawn: score against KL, proxy against score, and the training curves of each group."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from align.tools.comparison.figures import Comparison, GroupFit
from align.tools.comparison.words import number, ranged
from align.training.bootstrap import Estimate
from align.training.report.panels import TITLES, Metrics
from align.training.report.plots import COLOURS, SERIES, Curve, Panel, curves_panel, new_axes, svg_of

INK = "#010101"
MARKS = "osD^vPX"  # one more than colours, so that no two of many series look the same
WANTED = ("loss", "accuracy", "score", "reward", "kl", "kl_per_token", "response_tokens")  # of training curves
MOST_CURVES = COLOURS

Points = list[tuple[Estimate, Estimate]]  # (KL, score)


def frontier(c: Comparison) -> Panel:
    """Mean score against KL: all runs by group, the baseline, best-of-n."""
    shown = {group: [(c.kl_of(i), c.score_of(i)) for i in members] for group, members in c.groups.items()}
    for by, points in groupby(c.best_of, key=lambda point: point.by):
        shown[f"best of n by {by}"] = [(_exact(point.kl), point.score) for point in points]
    return _scatter(c, f"{c.score} against KL", c.score, shown, fits=False)


def overoptimisation(c: Comparison) -> list[Panel]:
    """For each group: the proxy and the score against KL, with the fitted law of the score."""
    if c.proxy is None:
        return []
    panels = []
    for group, members in c.groups.items():
        kls = [c.kl_of(i) for i in members]
        both = {
            name: [(kl, c.runs[i].scores[name]) for kl, i in zip(kls, members, strict=True)]
            for name in (c.score, c.proxy)
        }
        panels.append(_scatter(c, group, "", both, fits=True, group=group))
    for by, found in groupby(c.best_of, key=lambda point: point.by):
        points = list(found)
        of = {c.score: [(_exact(p.kl), p.score) for p in points], c.proxy: [(_exact(p.kl), p.proxy) for p in points]}
        name = f"best of n by {by}"
        panels.append(_scatter(c, name, "", of, fits=True, group=name))
    return panels


def training_curves(c: Comparison, runs: list[Path | None]) -> tuple[list[Panel], list[str]]:
    """Panels by group and metric, and the names of the runs without curves; `runs`: each run's training folder."""
    metrics = {i: Metrics.read(folder / "metrics.jsonl") for i, folder in enumerate(runs) if folder is not None}
    panels = []
    for group, members in c.groups.items():
        there = [i for i in members if i in metrics]
        names = dict.fromkeys(name for i in there for name in metrics[i].names())
        for name in names:
            if name.partition("/")[0] not in WANTED:
                continue
            curves = [curve for i in there for curve in _curve(metrics[i], name, c.runs[i].name)]
            more = f" ({MOST_CURVES} of {len(curves)} runs)" if len(curves) > MOST_CURVES else ""
            title = f"{group}: {TITLES.get(name, name.replace('_', ' '))}{more}"
            panels.append(curves_panel(title, curves[:MOST_CURVES]))
    return panels, [c.runs[i].name for members in c.groups.values() for i in members if i not in metrics]


def _curve(metrics: Metrics, name: str, run: str) -> Iterator[Curve]:
    """The run's held-out values, or else those of training."""
    for split in ("eval", "train"):
        curve = metrics.curve(split, name, f"{run}, {split}")
        if len(curve.steps):
            yield curve._replace(band=None)
            return


def _scatter(
    c: Comparison, title: str, what: str, shown: dict[str, Points], *, fits: bool, group: str | None = None
) -> Panel:
    figure, axes = new_axes()
    captions = []
    for n, (name, points) in enumerate(shown.items()):
        points = sorted(points, key=lambda point: point[0].value)
        x, y = (np.array([point[side].value for point in points]) for side in (0, 1))
        spread = [
            np.abs(np.array([(p[side].low, p[side].high) for p in points]) - centre[:, None]).T
            for side, centre in ((0, x), (1, y))
        ]
        look = {"color": SERIES[n % COLOURS], "marker": MARKS[n % len(MARKS)], "ms": 4.5, "elinewidth": 0.9}
        axes.errorbar(x, y, xerr=np.nan_to_num(spread[0]), yerr=np.nan_to_num(spread[1]), ls="none", **look)
        axes.plot(x, y, color=SERIES[n % COLOURS], lw=0.8, alpha=0.5)
        ends = points if len(points) == 1 else (points[0], points[-1])
        course = " → ".join(f"{ranged(score)} at KL {number(kl.value)}" for kl, score in ends)
        captions.append(f"{name}: {course}")
        for law in (f for f in c.fits if fits and name == c.score and f.group == group):
            captions[-1] += f". {_law(law, x)}"
            begin = c.score_of(c.baseline).value
            over = np.linspace(0, x.max(), 100)
            axes.plot(over, begin + law.fit.curve(over), color=SERIES[n % COLOURS], lw=1.2, ls="--")
    if c.baseline is not None and not fits:
        kl, score = c.kl_of(c.baseline), c.score_of(c.baseline)
        axes.axhline(score.value, color=INK, lw=0.8, ls=":", alpha=0.7)
        axes.plot([kl.value], [score.value], marker="*", ms=9, color=INK, ls="none")
        captions.append(f"★ baseline, {c.runs[c.baseline].name}: {ranged(score)} at KL {number(kl.value)}")
    return Panel(title, svg_of(figure, f"{title}: {what} over KL in nats. {'. '.join(captions)}"), captions)


def _law(found: GroupFit, kl: np.ndarray) -> str:
    law = found.fit
    formula = "d (a − b d)" if law.law == "best_of_n" else "d (a − b log d)"
    said = f"Dashed: gain = {formula}, d = √KL, a = {ranged(law.a)}, b = {ranged(law.b)}"
    inside = kl.min() <= law.peak_kl <= kl.max()
    return said + (f", highest at KL {number(law.peak_kl)}" if inside else ", no peak within these KLs")


def _exact(x: float) -> Estimate:
    return Estimate(x, x, x, 0)
