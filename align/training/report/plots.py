"""Numbers in words, and plots with their words as inline SVG that follows the page: its colours are CSS
variables, so one drawing serves light and dark.

The page must define `--ink`, `--grid` and `--c0` … `--c5`. Titles and legends are the page's, in HTML: the
drawing holds only curves and axis numbers, so no text from a run passes through matplotlib.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, MaxNLocator, PercentFormatter, ScalarFormatter

MOST_POINTS = 2000
COLOURS = 6

# Colours that matplotlib draws with, each replaced by a variable in the finished SVG.
_INK, GRID = "#010101", "#010102"
SERIES = [f"#0102{i:02x}" for i in range(COLOURS)]
_VARIABLES = {_INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--c{i})" for i, c in enumerate(SERIES)}


class Curve(NamedTuple):
    """A metric over steps."""

    label: str
    steps: np.ndarray  # (points,) int64, ascending
    values: np.ndarray  # (points,) float64
    dots: bool = False  # few points, each worth a mark: evaluations
    band: np.ndarray | None = None  # (points, 2) float64, the 95 % interval of each value; nan where unknown

    @property
    def finite(self) -> Curve:
        """Only the points that can be drawn."""
        kept = np.isfinite(self.values)
        band = None if self.band is None else self.band[kept]
        return self._replace(steps=self.steps[kept], values=self.values[kept], band=band)


class Panel(NamedTuple):
    """A plot under its heading, and in words what it shows."""

    title: str
    svg: Markup | None  # None when no point can be drawn
    captions: list[str]  # one per curve, in the order of colours


def curves_panel(title: str, curves: Sequence[Curve]) -> Panel:
    """Curves over steps in one pair of axes."""
    captions = [f"{curve.label}: {_course(curve)}" for curve in curves]
    if not any(len(curve.finite.steps) for curve in curves):
        return Panel(title, None, captions)
    figure, axes = new_axes()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for i, (_, steps, values, dots, band) in enumerate(curve.finite for curve in curves):
        colour = SERIES[i % COLOURS]
        if band is not None:
            axes.fill_between(steps, *band.T, color=colour, alpha=0.18, lw=0)
        # Thin is every point, thick its running mean; a curve that does not zigzag has none.
        noisy = not dots and len(steps) >= 100 and np.abs(np.diff(values)).sum() > 4 * np.ptp(values)
        mark = "o" if dots or len(steps) == 1 else None
        look = {"lw": 0.8, "alpha": 0.45} if noisy else {"lw": 1.5, "marker": mark, "markersize": 3}
        axes.plot(*thinned(steps, values), color=colour, **look)
        if noisy:
            axes.plot(*thinned(steps, running_mean(values, len(values) // 50)), color=colour, lw=1.8)
    return Panel(title, svg_of(figure, f"{title} by step. {'. '.join(captions)}"), captions)


def histogram_panel(title: str, edges: Sequence[float], counts: Sequence[int]) -> Panel:
    """A histogram of (bins,) counts over (bins + 1,) edges."""
    figure, axes = new_axes()
    axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    top = int(np.argmax(counts))
    caption = f"{amount(sum(counts))} examples of {value(edges[0])} to {value(edges[-1])} tokens; "
    caption += f"most, {amount(counts[top])}, have {value(edges[top])} to {value(edges[top + 1])}"
    return Panel(title, svg_of(figure, f"{title}. {caption}"), [caption])


def shares_panel(title: str, edges: np.ndarray, shares: dict[int, np.ndarray]) -> Panel:
    """Histograms by step: shares (bins,) over (bins - 1,) edges, all drawn equally wide, the outer ones open."""
    figure, axes = new_axes()
    captions = []
    zero = np.searchsorted(edges, 0.0)
    for i, (step, share) in enumerate(shares.items()):
        drawn = np.nan_to_num(share)
        axes.stairs(drawn, np.arange(len(drawn) + 1), fill=True, color=SERIES[i % COLOURS], alpha=0.3)
        axes.stairs(drawn, np.arange(len(drawn) + 1), color=SERIES[i % COLOURS], lw=1.5)
        below = f"{percent(drawn[: zero + 1].sum())} below 0; " if zero < len(edges) and edges[zero] == 0 else ""
        top = int(np.argmax(drawn))
        captions.append(f"step {step}: {below}most, {percent(drawn[top])}, {_bin(edges, top)}")
    every = -(-len(edges) // 9)
    named = np.arange(zero % every, len(edges), every)  # with 0, where there is one
    axes.set_xticks(named + 1, [value(edges[i]).replace("-", "−") for i in named])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_ylim(bottom=0)
    return Panel(title, svg_of(figure, f"{title}. {'. '.join(captions)}"), captions)


def _bin(edges: np.ndarray, i: int) -> str:
    if i == 0:
        return f"below {value(edges[0])}"
    return f"from {value(edges[i - 1])} " + (f"to {value(edges[i])}" if i < len(edges) else "on")


def calibration_panel(title: str, points: dict[int, np.ndarray]) -> Panel:
    """Curves by step: points (bins, 2), how sure and how often right; on the diagonal both are the same."""
    figure, axes = new_axes()
    captions = []
    kept = {step: both[np.isfinite(both).all(1)] for step, both in points.items()}
    start = 0.5 if all((both[:, 0] >= 0.5).all() for both in kept.values()) else 0.0
    axes.plot([start, 1], [start, 1], color=_INK, lw=0.8, ls="--", alpha=0.6)
    for i, (step, both) in enumerate(kept.items()):
        axes.plot(*both.T, color=SERIES[i % COLOURS], lw=1.5, marker="o", markersize=3)
        told = ", ".join(f"{percent(right)} right where {percent(sure)} sure" for sure, right in both)
        captions.append(f"step {step}: {told or 'nothing counted'}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return Panel(title, svg_of(figure, f"{title}. {'. '.join(captions)}"), captions)


def value(x: float) -> str:
    """A measured number: four digits, or all of an integer's."""
    if not math.isfinite(x):
        return "not a number" if math.isnan(x) else "infinite" if x > 0 else "minus infinite"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def amount(n: float) -> str:
    """How many: exact below ten thousand, then three digits with k, M, G or T."""
    if n < 10_000:
        return f"{n:,.0f}"
    n = float(f"{n:.3g}")
    power = min((len(f"{n:.0f}") - 1) // 3, 4)
    return f"{n / 1000**power:.3g} {'kMGT'[power - 1]}"


def duration(seconds: float) -> str:
    """3 min 20 s: the two largest units."""
    units = (("d", 86_400), ("h", 3600), ("min", 60))
    whole = round(seconds)
    for (unit, length), (below, part) in zip(units, (*units[1:], ("s", 1)), strict=True):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {below}"
    return f"{seconds:.3g} s"


def size(n_bytes: float) -> str:
    """Bytes in binary units."""
    unit = 0 if n_bytes < 1 else min(int(math.log2(n_bytes)) // 10, 4)
    return f"{n_bytes / 1024**unit:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def change(before: float, after: float) -> str:
    """By how much, in per cent of before; empty where that says nothing."""
    if not (math.isfinite(before) and math.isfinite(after) and before):
        return ""
    return f"{100 * (after - before) / abs(before):+.1f} %".replace("-", "−")


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def _course(curve: Curve) -> str:
    """First, last, lowest and highest."""
    _, steps, values, _, band = curve.finite
    said = []
    if len(steps):
        said = [f"{value(values[0])} at step {steps[0]}"]
    if len(steps) > 1:
        low, high = values.argmin(), values.argmax()
        said[0] += f" → {value(values[-1])} at step {steps[-1]}"
        said.append(f"lowest {value(values[low])} at {steps[low]}, highest {value(values[high])} at {steps[high]}")
    if band is not None and len(band) and np.isfinite(band[-1]).all():
        said.append(f"95 % interval at the end {value(band[-1, 0])} to {value(band[-1, 1])}")
    if lost := len(curve.steps) - len(steps):
        said.append(f"{lost} not finite, not drawn")
    return "; ".join(said)


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: the lowest and highest of each of most/2 stretches, so no spike is lost."""
    if len(values) <= most:
        return steps, values
    cuts = np.linspace(0, len(values), most // 2 + 1).astype(int)
    ends = (np.argmin, np.argmax)
    kept = np.unique([start + end(values[start:stop]) for start, stop in pairwise(cuts) for end in ends])
    return steps[kept], values[kept]


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value with up to `reach` neighbours on either side: (points,) -> (points,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


@lru_cache(maxsize=1)
def pages() -> Environment:
    """The templates beside this file, with numbers in words."""
    return pages_of(Path(__file__).parent, amount=amount, value=value)


def pages_of(folder: Path, **filters: Callable[..., str]) -> Environment:
    """The templates in a folder, with filters by name. Names, prompts and answers may hold HTML: it is shown, never
    run."""
    found = Environment(
        loader=FileSystemLoader(folder, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= filters
    found.globals["colours"] = COLOURS
    return found


def new_axes() -> tuple[Figure, Axes]:
    """Empty ones. They are the same each time: to make axes and their ticks takes longer than to draw them. What is
    drawn in them is gone with the next call."""
    figure, axes = _axes()
    for artist in (*axes.lines, *axes.collections, *axes.patches):
        artist.remove()
    axes.containers.clear()
    axes.relim()
    axes.autoscale()
    for axis, locator in ((axes.xaxis, AutoLocator()), (axes.yaxis, MaxNLocator(nbins=5))):
        axis.set_major_locator(locator)
        axis.set_major_formatter(ScalarFormatter())
    return figure, axes


@cache
def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.5))  # points of text stay readable at a phone's width
    figure.subplots_adjust(left=0.14, right=0.98, bottom=0.12, top=0.92)  # a layout that fits itself draws all twice
    axes = figure.add_subplot()
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(color=GRID, labelcolor=_INK, labelsize=10, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(color=_INK, size=10)
        axis.set_label_coords(0, 0)  # there is no label whose place has to be found
    return figure, axes


def svg_of(figure: Figure, description: str) -> Markup:
    """The figure as an inline SVG element without metadata, ids that nothing refers to, or any address."""
    page = StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # The salt keeps ids apart between plots, and the same from one writing to the next.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(page, format="svg", transparent=True, metadata=no_metadata)
    svg = re.search(r"<svg[^>]*>(.*)</svg>", page.getvalue(), re.DOTALL)[1]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would reach the whole page
    svg = re.sub(r"font-family: [^;]*;", "", svg)
    referred = set(re.findall(r"#(\w+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = re.sub(r"#0[0-9a-f]{5}\b", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    width, height = figure.get_size_inches() * 72
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return Markup(f'<svg role="img" aria-label="{escape(description)}" {box}>{svg}</svg>')
