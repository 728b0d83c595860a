"""The run's report: everything a run folder tells, on one page that opens offline.

Reads what is there of

- recipe.yaml, environment.json;
- metrics.jsonl: `{"step": int, "split": "train" | "eval", name: number or list, …}`. Every metric is drawn as
  `panels.py` says, but for counters of work and time;
- summary.json: what the run cost: `tokens_seen`, `train_seconds`, `peak_memory_bytes`, `mfu`, …, or null;
- data.json: `{"train" | "eval": {"examples", "tokens", "trained_tokens", "lengths": {"edges", "counts"}},
  "summary": [line, …]}`; ledger.jsonl: `{"file", "line", "action", "reason"}`;
- classification.json: a classifier's held-out rows, as `classification_plots.py` draws them;
- episodes.jsonl: PPO's responses, as `rollout_plots.py` shows them; answers.jsonl: answers, as `answered.py` does;
- samples.jsonl: `{"step", "prompt", "response"}`, step 0 before training and the last step after.

The same folder, with the same sentence on its state, gives the same page, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from markupsafe import Markup

from align.training.meters import SPIKE_SIGMAS, SPIKE_WINDOW, SPREAD_STEPS, loss_stability
from align.training.report.answered import answers_section
from align.training.report.classification_plots import classification_section
from align.training.report.panels import ANSWERS, Metrics, curves, distributions, panel_title, records
from align.training.report.plots import Curve, amount, change, duration, pages, percent, size, value
from align.training.report.rollout_plots import rollout_section
from align.training.runs.durable import write_atomic

LEDGER_ROWS = 50
FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, where PyYAML was built with it


def write_report(run: Path, state: str = "") -> Path:
    """Write `run`/report.html from whatever the run has left so far; a reader never sees half a page. `state`: a
    sentence on how far it is. Raises UserError where the disk refuses."""
    metrics = Metrics.read(run / "metrics.jsonl")
    data = _json(run / "data.json")
    recipe = _text(run / "recipe.yaml")
    template = pages()
    template.filters["plain"] = plain
    html = template.get_template("page.html.jinja").render(
        name=run.resolve().name,
        state=state,
        settings=_settings(recipe),
        facts=facts(metrics, _json(run / "summary.json")),
        words=words(metrics),
        curves=curves(metrics),
        distributions=distributions(metrics, data),
        classification=_classification(run / "classification.json"),
        rollout=rollout_section(metrics, run / "episodes.jsonl", recipe),
        answers=answers_section(run / "answers.jsonl"),
        data=data,
        sides={name: side for name, side in data.items() if isinstance(side, dict) and side.get("examples")},
        ledger=Ledger.read(run / "ledger.jsonl"),
        samples=samples(run / "samples.jsonl"),
        ledger_rows=LEDGER_ROWS,
        recipe=recipe,
        environment=_json(run / "environment.json"),
    )
    target = run / "report.html"
    write_atomic(target, html.encode("utf-8", "replace"))  # JSON can hold half a surrogate pair, UTF-8 cannot
    return target


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
    right = metrics.curve("eval", "accuracy").finite
    if right.band is not None and len(right.steps):
        course = " → ".join(map(percent, right.values[[0, -1]] if len(right.steps) > 1 else right.values))
        shown.append(Fact("Eval accuracy", course, f"{_interval(right)}; step {right.steps[-1]}"))
    held = metrics.curve("eval", "response_tokens").finite, metrics.curve("eval", "score").finite
    if all(len(curve.steps) for curve in held):
        course = " → ".join(value(score) for score in held[1].values[[0, -1]])
        shown.append(Fact("Held-out score", course, f"at KL {value(metrics.curve('eval', 'kl').values[-1])} nats"))
    shown += _answers(metrics)
    kl = metrics.curve("eval", "kl_per_token").finite
    if len(kl.steps):
        shown.append(Fact("KL to the reference", value(kl.values[-1]), f"nats per token, eval; step {kl.steps[-1]}"))
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


def _answers(metrics: Metrics) -> Iterator[Fact]:
    """The figures of answers to held-out prompts, but for lengths and ends."""
    names = [name for name in metrics.names() if name.startswith(ANSWERS)]
    for name in [name for name in names if name.removeprefix(ANSWERS) not in ("response_tokens", "ended")][:3]:
        curve = metrics.curve("eval", name).finite
        if not len(curve.steps):
            continue
        course = " → ".join(map(value, curve.values[[0, -1]] if len(curve.steps) > 1 else curve.values))
        note = f"step {curve.steps[-1]}"
        if curve.band is not None and np.isfinite(curve.band[-1]).all():
            note = f"95 % interval {' to '.join(map(value, curve.band[-1]))}; {note}"
        yield Fact(panel_title(name), course, note)


def words(metrics: Metrics) -> list[str]:
    """What the numbers say, in sentences that claim no more than they do."""
    said = []
    ppl = metrics.curve("eval", "perplexity")
    if len(ppl.steps) > 1 and np.isfinite(ppl.values[[0, -1]]).all():
        before, after = map(value, ppl.values[[0, -1]])
        verb = "fell" if ppl.values[-1] < ppl.values[0] else "rose"
        course = f"{verb} from {before} to {after}" if before != after else f"began and ended at {before}"
        said.append(f"Perplexity on the held-out rows {course}.")
    said += _preferences(metrics)
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


def _preferences(metrics: Metrics) -> Iterator[str]:
    """What held-out pairs, or labelled answers, say."""
    right = metrics.curve("eval", "accuracy").finite
    if right.band is not None and len(right.steps) and len(metrics.curve("eval", "margin").steps):
        low, high = right.band[-1]
        chance = ", which does not rule out chance" if low <= 0.5 <= high else ""
        yield f"Of the held-out pairs {percent(right.values[-1])} are ranked rightly ({_interval(right)}){chance}."
    for better, worse in (("chosen", "rejected"), ("desirable", "undesirable")):
        own, other = (metrics.curve("eval", f"nll_per_token/{side}").finite for side in (better, worse))
        if min(len(own.steps), len(other.steps)) < 2:
            continue
        (before, after), (start, end) = -own.values[[0, -1]], -other.values[[0, -1]]
        course = f"{value(before)} to {value(after)} nats a token ({worse}: {value(start)} to {value(end)})"
        if after > before:
            yield f"The {better} answers of the held-out rows became more likely: {course}."
        elif after < before:
            warning = "a margin can grow so while the model leaves both kinds of answers behind"
            yield f"The {better} answers of the held-out rows became less likely: {course}; {warning}."


def _interval(share: Curve) -> str:
    low, high = share.band[-1]
    return f"95 % interval {percent(low)} to {percent(high)}" if low <= high else "95 % interval unknown"


class Ledger(NamedTuple):
    """ledger.jsonl, counted, and its first rows. Reasons that differ only in numbers count as one."""

    total: int
    counts: list[tuple[str, str, int]]  # action, reason with each number as "N", rows; most first
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Ledger:
        counter: Counter[tuple[str, str]] = Counter()
        first = []
        for row in filter(None, records(path)):
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
    rows = [row for row in records(path) if row and isinstance(row.get("step"), int)]
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


def _classification(path: Path) -> Markup:
    try:
        return classification_section(_json(path))
    except (LookupError, TypeError, ValueError, AttributeError):  # somebody changed it
        return Markup("<p>classification.json is not as align writes it, and is left out.</p>")


def _settings(recipe: str | None) -> dict[str, Any]:
    """The recipe's own values; nothing where it cannot be read."""
    try:
        settings = yaml.load(recipe or "", FAST)
    except yaml.YAMLError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", "replace") if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):  # torn by a kill
        return {}
    return found if isinstance(found, dict) else {}
