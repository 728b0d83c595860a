"""The part of PPO and GRPO in the run's report: reward against KL, warnings, and responses over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from align.training.report.panels import Metrics, records
from align.training.report.plots import SERIES, Panel, new_axes, pages, svg_of, value
from align.training.rollouts.diagnosis import Finding, diagnose


def rollout_section(metrics: Metrics, episodes: Path, recipe: str) -> Markup:
    """Nothing for a run that sampled nothing; `recipe` is the text of recipe.yaml."""
    points = {split: _points(metrics, split) for split in ("train", "eval")}
    if not any(points.values()):
        return Markup()
    page = pages().get_template("rollout.html.jinja")
    panel = frontier_panel(points["train"], points["eval"])
    return Markup(page.render(panel=panel, findings=findings(metrics, recipe), said=_said(episodes)))


def frontier_panel(train: list[tuple[float, float]], held: list[tuple[float, float]]) -> Panel:
    """Score against KL: (kl, score) of every step, and of the evaluations, joined in their order."""
    figure, axes = new_axes()
    captions = []
    for i, (name, points) in enumerate((("responses in training", train), ("held-out prompts", held))):
        if points:
            joined = {"lw": 1.5} if name == "held-out prompts" else {"lw": 0, "alpha": 0.4}
            axes.plot(*zip(*points, strict=True), color=SERIES[i], marker="o", markersize=3, **joined)
            (first_kl, first), (last_kl, last) = points[0], points[-1]
            captions.append(
                f"{name}: score {value(first)} at KL {value(first_kl)} → {value(last)} at KL {value(last_kl)} nats"
            )
    return Panel("Score against KL to the reference", svg_of(figure, ". ".join(captions)), captions)


def findings(metrics: Metrics, recipe: str) -> list[Finding]:
    """What went wrong, as far as the metrics tell."""
    train, held = ([*metrics.splits.get(split, {}).values()] for split in ("train", "eval"))
    try:
        written = yaml.safe_load(recipe) or {}
        parts: list[dict[str, Any]] = written[written["stage"]]["rewards"]
    except (yaml.YAMLError, KeyError, TypeError):
        parts = []
    judges = [_title(part) for part in parts if not part.get("weight", 1.0)]
    return diagnose(train, held, judges)


def _title(part: dict[str, Any]) -> str:
    named = part.get("name") or (part.get("function") or "").partition(":")[2]
    return named or ("reward" if part.get("adapter") else "model")


def _points(metrics: Metrics, split: str) -> list[tuple[float, float]]:
    rows = metrics.splits.get(split, {}).values()
    return [(row["kl"], row["score"]) for row in rows if "kl" in row and "score" in row]


def _said(episodes: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each prompt with its responses in the order of steps."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in records(episodes):
        if row and isinstance(row.get("step"), int) and isinstance(row.get("score"), int | float):
            by_prompt.setdefault(str(row.get("prompt")), []).append(row)
    return list(by_prompt.items())
