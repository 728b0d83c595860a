"""The run's report: everything a run folder tells, on one page that opens offline.

Reads what is there of

- recipe.yaml, environment.json;
- metrics.jsonl: `{"step": int, "split": "train" | "eval", name: number, …}`. Every metric is drawn, those
  with a common prefix before "/" in one plot, but for counters of work and time;
- summary.json: what the run cost: `tokens_seen`, `train_seconds`, `peak_memory_bytes`, `mfu`, …, or null;
- data.json: `{"train" | "eval": {"examples", "tokens", "trained_tokens", "lengths": {"edges", "counts"}},
  "summary": [line, …]}`; ledger.jsonl: `{"file", "line", "action", "reason"}`;
- samples.jsonl: `{"step", "prompt", "response"}`, step 0 before training and the last step after.

The same folder gives the same page, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align.training.meters import SPIKE_SIGMAS, SPIKE_WINDOW, SPREAD_STEPS, loss_stability
from align.training.plots import (
    COLOURS,
    Curve,
    Panel,
    amount,
    change,
    curves_panel,
    duration,
    histogram_panel,
    size,
    value,
)

TITLES = {
    "loss": "Loss",
    "perplexity": "Perplexity",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second per device",
}
NOT_DRAWN = {"step", "split", "epoch", "tokens", "tokens_seen", "step_seconds", "elapsed_seconds", "eval_seconds"}
LEDGER_ROWS = 50


def write_report(run: Path) -> Path:
    """Write `run`/report.html from whatever the run has left so far; a reader never sees half a page."""
    metrics = Metrics.read(run / "metrics.jsonl")
    data = _json(run / "data.json")
    recipe = _text(run / "recipe.yaml")
    html = (
        _pages()
        .get_template("report.html.jinja")
        .render(
            name=run.resolve().name,
            settings=_settings(recipe),
            facts=facts(metrics, _json(run / "summary.json")),
            words=words(metrics),
            panels=[*panels(metrics), *length_panels(data)],
            data=data,
            ledger=Ledger.read(run / "ledger.jsonl"),
            samples=samples(run / "samples.jsonl"),
            ledger_rows=LEDGER_ROWS,
            recipe=recipe,
            environment=_json(run / "environment.json"),
        )
    )
    target, beside = run / "report.html", run / "report.html.new"
    beside.write_bytes(html.encode("utf-8", "replace"))  # JSON can hold half a surrogate pair, UTF-8 cannot
    os.replace(beside, target)
    return target


class Metrics(NamedTuple):
    """metrics.jsonl by split, step and name. A step logged again after a resume counts once."""

    splits: dict[str, dict[int, dict[str, float]]]
    unreadable: int

    @classmethod
    def read(cls, path: Path) -> Metrics:
        splits: dict[str, dict[int, dict[str, float]]] = {}
        unreadable = 0
        for row in _rows(path):
            if row is None or not isinstance(row.get("step"), int) or not isinstance(row.get("split"), str):
                unreadable += 1
                continue
            numbers = {k: float(v) for k, v in row.items() if type(v) in (int, float)}
            splits.setdefault(row["split"], {}).setdefault(row["step"], {}).update(numbers)
        return cls({split: dict(sorted(steps.items())) for split, steps in splits.items()}, unreadable)

    def curve(self, split: str, name: str, label: str = "") -> Curve:
        """One metric of one split; without points where it was not logged."""
        points = [(step, row[name]) for step, row in self.splits.get(split, {}).items() if name in row]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return Curve(label, steps.astype(np.int64), values, dots=split != "train")

    def names(self) -> list[str]:
        """Every drawn metric: the well-known first, the others in order of appearance."""
        rows = (row for steps in self.splits.values() for row in steps.values())
        logged = dict.fromkeys(name for row in rows for name in row)
        known = [name for name in TITLES if name in logged]
        return known + [name for name in logged if name not in TITLES and name not in NOT_DRAWN]


class Fact(NamedTuple):
    """One figure of the headline."""

    label: str
    value: str
    note: str = ""


def facts(metrics: Metrics, summary: dict[str, Any]) -> list[Fact]:
    """The headline's figures, of what was logged and what it cost."""
    shown = []
    ppl = metrics.curve("eval", "perplexity")
    if len(ppl.steps) > 1:
        before, after = ppl.values[0], ppl.values[-1]
        note = ", ".join(filter(None, (change(before, after), f"step {ppl.steps[0]} → {ppl.steps[-1]}")))
        shown.append(Fact("Eval perplexity", f"{value(before)} → {value(after)}", note))
    elif len(ppl.steps):
        shown.append(Fact("Eval perplexity", value(ppl.values[0]), f"at step {ppl.steps[0]}"))
    loss = metrics.curve("train", "loss")
    if len(loss.steps):
        note = f"at step {loss.steps[-1]}; {value(loss.values[0])} at step {loss.steps[0]}"
        shown.append(Fact("Train loss", value(loss.values[-1]), note))
    rate = metrics.curve("train", "tokens_per_second").finite
    if len(rate.steps):
        note = f"per device, median; {value(rate.values[-1])} at step {rate.steps[-1]}"
        shown.append(Fact("Tokens per second", value(float(np.median(rate.values))), note))
    for name, label, show in (
        ("tokens_seen", "Tokens seen", amount),
        ("train_seconds", "Time in training steps", duration),
        ("peak_memory_bytes", "Peak memory", size),
        ("mfu", "Model FLOPs utilisation", "{:.1%}".format),
        ("save_durable_seconds", "Last checkpoint durable after", duration),
    ):
        if isinstance(summary.get(name), int | float):
            shown.append(Fact(label, show(summary[name])))
    return shown


def words(metrics: Metrics) -> list[str]:
    """What the numbers say, in sentences that claim no more than they do."""
    said = []
    ppl = metrics.curve("eval", "perplexity")
    if len(ppl.steps) > 1 and np.isfinite(ppl.values[[0, -1]]).all():
        before, after = map(value, ppl.values[[0, -1]])
        verb = "fell" if ppl.values[-1] < ppl.values[0] else "rose"
        course = f"{verb} from {before} to {after}" if before != after else f"began and ended at {before}"
        said.append(f"Perplexity on the held-out rows {course}.")
    loss = metrics.curve("train", "loss")
    if len(broken := loss.steps[~np.isfinite(loss.values)]):
        said.append(f"Train losses that are not finite: {len(broken)}, the first at step {broken[0]}.")
    stability = loss_stability(loss.finite.steps, loss.finite.values)
    if stability.spread is not None:
        spread = f"a standard deviation of {value(stability.spread)}"
        said.append(f"The train loss has {spread} over the first {SPREAD_STEPS} steps.")
    if stability.spikes is not None:
        steps = ", ".join(map(str, stability.spikes[:10])) + (", …" if len(stability.spikes) > 10 else "")
        rule = f"above mean + {SPIKE_SIGMAS} sigma of the {SPIKE_WINDOW} logged before"
        said.append(f"Loss spikes ({rule}) at steps {steps}." if steps else f"No loss spikes ({rule}).")
    elif len(loss.steps):
        said.append(f"Spikes are looked for after {SPIKE_WINDOW} logged losses; this run has {len(loss.steps)}.")
    if metrics.unreadable:
        said.append(f"Lines of metrics.jsonl that could not be read, and are left out: {metrics.unreadable}.")
    return said


def panels(metrics: Metrics) -> list[Panel]:
    """One plot per metric, or per prefix before "/", with its curves of every split."""
    groups: dict[str, list[Curve]] = {}
    for name in metrics.names():
        group, _, short = name.partition("/")
        for split in sorted(metrics.splits, reverse=True):  # train before eval
            curve = metrics.curve(split, name, f"{short}, {split}" if short else split)
            if len(curve.steps):
                groups.setdefault(group, []).append(curve)
    titles = {group: group.replace("_", " ").capitalize() for group in groups} | TITLES
    return [curves_panel(titles[group], curves) for group, curves in groups.items()]


def length_panels(data: dict[str, Any]) -> list[Panel]:
    """A histogram of example lengths per split that data.json knows."""
    return [
        histogram_panel(f"Tokens in one {split} example", **data[split]["lengths"])
        for split in ("train", "eval")
        if sum(data.get(split, {}).get("lengths", {}).get("counts", []))
    ]


class Ledger(NamedTuple):
    """ledger.jsonl, counted, and its first rows. Reasons that differ only in numbers count as one."""

    total: int
    counts: list[tuple[str, str, int]]  # action, reason with each number as "N", rows; most first
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Ledger:
        counter: Counter[tuple[str, str]] = Counter()
        first = []
        for row in filter(None, _rows(path)):
            reason = re.sub(r"\d[\d,.]*\d|\d", "N", str(row.get("reason", "")))
            counter[str(row.get("action", "")), reason] += 1
            if len(first) < LEDGER_ROWS:
                first.append(row)
        return cls(counter.total(), [(*key, count) for key, count in counter.most_common()], first)


class Sample(NamedTuple):
    """A prompt with the model's answers by step: before training, and after."""

    prompt: str
    before: str | None
    after: str | None
    last: int


def samples(path: Path) -> list[Sample]:
    """The first and the last answers to each prompt, prompts in the order in which they were given."""
    rows = [row for row in _rows(path) if row and isinstance(row.get("step"), int)]
    last = max((row["step"] for row in rows), default=0)
    answers = {(str(row.get("prompt", "")), row["step"]): str(row.get("response", "")) for row in rows}
    prompts = dict.fromkeys(prompt for prompt, _ in answers)
    return [Sample(p, answers.get((p, 0)), answers.get((p, last)) if last else None, last) for p in prompts]


def plain(entry: Any) -> str:
    """An entry of environment.json in words."""
    if isinstance(entry, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in entry.items())
    if isinstance(entry, list):
        return ", ".join(map(plain, entry))
    if isinstance(entry, bool):
        return "yes" if entry else "no"
    return "–" if entry is None else str(entry)


def _pages() -> Environment:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # rows and samples may hold HTML: it is shown, never run
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"amount": amount, "plain": plain}
    pages.globals["colours"] = COLOURS
    return pages


def _settings(recipe: str | None) -> dict[str, Any]:
    """The recipe's own values; nothing where it cannot be read."""
    try:
        settings = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", "replace") if path.exists() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_text(path) or "{}")
    except ValueError:  # torn by a kill
        return {}


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON lines file; None for any other line, save a last one that a kill has torn."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif line.endswith(b"\n"):
                yield None
