"""What is drawn of metrics.jsonl and data.json: which metrics share a plot, and what the plots are called.

A metric may be a number or a list of numbers. Some names belong together:

- `a/b` and `a/c` share one plot, but for figures of answers, `generate/b`;
- `x_low` and `x_high` are the 95 % interval of `x`;
- `x_share`, a list, holds the share of rows in each bin of `x`, between the `x_edges` of the same record: the first bin
  lies below the first edge, the last one from the last edge on;
- `x_confidence` and `x_accuracy`, lists, hold for each bin of rows how sure the model was, and how often right.

A list without its partner is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from align.recipe.records import each_line
from align.training.report.plots import Curve, Panel, calibration_panel, curves_panel, histogram_panel, shares_panel

TITLES = {  # in the order of the page
    "loss": "Loss",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "generate": "Answers",
    "margin": "Margin",
    "score": "Scores",
    "failures": "Responses without a score",
    "rewards": "Rewards",
    "nll_per_token": "Negative log-likelihood per token",
    "reward": "Score less the KL penalty",
    "kl": "KL to the reference per response",
    "kl_per_token": "KL to the reference per token",
    "kl_coef": "KL coefficient",
    "entropy": "Entropy per token",
    "response_tokens": "Tokens of a response",
    "ended": "Share of responses that end",
    "clip_fraction": "Share that is clipped",
    "update_kl": "KL of an update per token",
    "explained_variance": "Explained variance of the returns",
    "value": "Returns and values",
    "kl_baseline": "Baseline of KTO",
    "logprobs": "Log-likelihood of whole answers",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second per device",
}
ANSWERS = "generate/"  # before the names of figures of answers, each of which has a plot of its own
NOT_DRAWN = {"step", "split", "epoch", "tokens", "tokens_seen", "updates", "sampled_tokens_per_second"}


class Metrics(NamedTuple):
    """metrics.jsonl by split, step and name. A step logged again after a resume counts once."""

    splits: dict[str, dict[int, dict[str, float]]]
    lists: dict[str, dict[int, dict[str, np.ndarray]]]  # each (bins,) float64, nan where nothing was counted
    unreadable: int

    @classmethod
    def read(cls, path: Path) -> Metrics:
        """All that can be read; lines that cannot are counted."""
        splits: dict[str, dict[int, dict[str, float]]] = {}
        lists: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        unreadable = 0
        for row in records(path):
            if row is None or not isinstance(row.get("step"), int) or not isinstance(row.get("split"), str):
                unreadable += 1
                continue
            numbers = {k: _number(v) for k, v in row.items() if type(v) in (int, float, NoneType)}
            vectors = {k: np.array([*map(_number, v)]) for k, v in row.items() if _is_vector(v)}
            splits.setdefault(row["split"], {}).setdefault(row["step"], {}).update(numbers)
            lists.setdefault(row["split"], {}).setdefault(row["step"], {}).update(vectors)
        splits, lists = ({name: dict(sorted(side.items())) for name, side in by.items()} for by in (splits, lists))
        return cls(splits, lists, unreadable)

    def curve(self, split: str, name: str, label: str = "") -> Curve:
        """One metric of one split, with its interval if it has one; without points where it was not logged."""
        points = {step: row for step, row in self.splits.get(split, {}).items() if name in row}
        low, high = f"{name}_low", f"{name}_high"
        band = [(row.get(low, np.nan), row.get(high, np.nan)) for row in points.values()]
        return Curve(
            label,
            np.array([*points], np.int64),
            np.array([row[name] for row in points.values()], np.float64),
            dots=split != "train",
            band=np.array(band) if np.isfinite(band).any() else None,
        )

    def ends(self, split: str, *names: str) -> list[tuple[int, list[np.ndarray]]]:
        """The first and the last step that hold all these lists, with the lists: two steps, one, or none."""
        held = [
            (step, [row[name] for name in names])
            for step, row in self.lists.get(split, {}).items()
            if all(name in row for name in names)
        ]
        return held if len(held) < 3 else [held[0], held[-1]]

    def names(self) -> list[str]:
        """Every metric with a curve: the well-known first, the others in order of appearance."""
        logged = _names({split: self.splits.get(split, {}) for split in ("train", "eval")})
        intervals = {f"{name}_{end}" for name in logged for end in ("low", "high")}
        drawn = [name for name in logged if name not in NOT_DRAWN | intervals and not name.endswith("_seconds")]
        place = {group: i for i, group in enumerate(TITLES)}
        return sorted(drawn, key=lambda name: place.get(name.partition("/")[0], len(place)))


def curves(metrics: Metrics) -> list[Panel]:
    """One plot per metric, or per prefix before "/", with its curves of every split."""
    groups: dict[str, list[Curve]] = {}
    for name in metrics.names():
        group, _, short = name.partition("/") if not name.startswith(ANSWERS) else (name, "", "")
        for split in ("train", "eval"):
            curve = metrics.curve(split, name, f"{short}, {split}" if short else split)
            if len(curve.steps):
                groups.setdefault(group, []).append(curve)
    return [curves_panel(panel_title(group), found) for group, found in groups.items()]


def distributions(metrics: Metrics, data: dict[str, Any]) -> list[Panel]:
    """How held-out rows lie before training and after, and how long examples are."""
    return [*_shares(metrics), *_calibrations(metrics), *_lengths(data)]


def _shares(metrics: Metrics) -> Iterator[Panel]:
    for bare in _stems(metrics, "_share"):
        ends = metrics.ends("eval", f"{bare}_share", f"{bare}_edges")
        edges = ends[-1][1][1] if ends else np.zeros(0)
        same = {step: share for step, (share, own) in ends if np.array_equal(own, edges)}
        fits = {step: share for step, share in same.items() if len(share) == len(edges) + 1 >= 2}
        if fits:
            yield shares_panel(f"{panel_title(bare)}: shares of the eval rows", edges, fits)


def _calibrations(metrics: Metrics) -> Iterator[Panel]:
    for bare in _stems(metrics, "_confidence"):
        ends = metrics.ends("eval", f"{bare}_confidence", f"{bare}_accuracy")
        points = {step: np.stack(both, 1) for step, both in ends if len(both[0]) == len(both[1])}
        if points:
            yield calibration_panel(f"{panel_title(bare)}: how often right, by how sure", points)


def _lengths(data: dict[str, Any]) -> Iterator[Panel]:
    for split in ("train", "eval"):
        if sum(data.get(split, {}).get("lengths", {}).get("counts", [])):
            yield histogram_panel(f"Tokens in one {split} example", **data[split]["lengths"])


def _stems(metrics: Metrics, ending: str) -> list[str]:
    return [name.removesuffix(ending) for name in _names(metrics.lists) if name.endswith(ending)]


def _names(by_split: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(name for steps in by_split.values() for row in steps.values() for name in row))


def panel_title(name: str) -> str:
    """What the plot of a metric, or of those with a common prefix, is called."""
    if name.startswith(ANSWERS):
        return f"{TITLES['generate']}: {name.removeprefix(ANSWERS).replace('_', ' ')}"
    return TITLES.get(name, name.replace("_", " ").capitalize())


def _number(value: float | None) -> float:
    try:
        return np.nan if value is None else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return np.nan


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and all(entry is None or type(entry) in (int, float) for entry in value)


def records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON lines file; None for any other line, save a last one that a kill has torn."""
    torn = False
    for _, row in each_line(path):
        if torn:
            yield None
        if torn := row is None:
            continue
        yield row
