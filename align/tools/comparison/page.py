"""A comparison written down: report.html, one page that opens offline; compare.json; compare.md."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.recipe.records import to_json
from align.tools.comparison.evaluated import Evaluated
from align.tools.comparison.figures import Comparison
from align.tools.comparison.plots import frontier, overoptimisation, training_curves
from align.tools.comparison.standings import standings
from align.tools.comparison.summary import answers, details, headlines, notes, summary
from align.tools.comparison.verdict import duel_words
from align.tools.comparison.words import KLS, number, ranged, rate
from align.training.bootstrap import Estimate
from align.training.report.plots import amount, duration, pages_of, size

SHOWN_PROMPTS = 100  # whose answers the page holds
SHOWN_TEXT = 4000  # characters of one of them
MATRIX = 12  # most runs in the table of all pairs


def page(c: Comparison, runs: Sequence[Evaluated], recipe: str) -> str:
    """report.html."""
    folders = [_training(run) for run in runs]
    curves, without = training_curves(c, folders)
    filters = {"counts": _counts, "ranged": ranged, "number": number, "measured": _measured}
    pages = pages_of(Path(__file__).parent, **filters)
    script = pages.loader.get_source(pages, "page.js.jinja")[0]
    return pages.get_template("page.html.jinja").render(
        c=c,
        headlines=headlines(c),
        answers=answers(c),
        details=details(c),
        standings=standings(c),
        notes=notes(c),
        frontier=frontier(c),
        overoptimisation=overoptimisation(c),
        curves=curves,
        without=without,
        rows=rows(c),
        matrix=_matrix(c) if len(c.runs) <= MATRIX else None,
        measures=list(dict.fromkeys(name for run in c.runs for name in run.metrics)),
        samples=_samples(c, runs),
        recipe=recipe,
        kl_words=KLS,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def figures(c: Comparison) -> str:
    """compare.json: every figure, nine digits each, null where it is not known; equal runs give equal bytes."""
    told = _plain(c) | {"headlines": headlines(c), "summary": summary(c), "notes": notes(c)}
    told |= {"standings": table} if (table := standings(c)) else {}
    for run in told["runs"]:
        del run["cost"]
    return to_json(told, indent=1) + "\n"


def costs(c: Comparison) -> str:
    """costs.json: what each run's training took, by its name."""
    return to_json({run.name: _plain(run.cost) for run in c.runs}, indent=1) + "\n"


def markdown(c: Comparison) -> str:
    """compare.md: the words, and a row a run."""
    lines = [f"# {'; '.join(headlines(c))}", ""]
    lines += [f"- **{asked}** {' '.join(told)} {meant}" for asked, told, meant in answers(c)]
    lines += [f"- {line}" for line in details(c)]
    for table in filter(None, (standings(c), rows(c))):
        lines += ["", _line(table[0]), _line(["---"] + ["---:"] * (len(table[0]) - 1)), *map(_line, table[1:])]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(c)), ""])


def rows(c: Comparison) -> list[list[str]]:
    """The table of runs, its head first: the baseline, then each group by KL."""
    full = any(run.kl_full for run in c.runs)
    head = ["Run", "Group", f"{c.score} (mean)", *([f"{c.proxy} (mean)"] if c.proxy else [])]
    head += ["KL, sequence", *(["KL, full vocabulary"] if full else [])]
    head += [*(["Wins against the baseline", "… at equal length"] if c.baseline is not None else []), "Tokens", "Ended"]
    head += ["Device time", "Peak memory", "Tokens sampled"]
    order = [i for members in c.groups.values() for i in sorted(members, key=lambda i: c.kl_of(i).value)]
    table = [head]
    for i in [*([] if c.baseline is None else [c.baseline]), *order]:
        run = c.runs[i]
        row = [run.name, "baseline" if run.baseline else run.group, ranged(run.scores[c.score])]
        row += [ranged(run.scores[c.proxy])] if c.proxy else []
        row += [ranged(run.kl_sequence)] + ([ranged(run.kl_full) if run.kl_full else "–"] if full else [])
        if c.baseline is not None:
            row += ["–", "–"] if run.baseline else [*_against(c, i, c.baseline)]
        row += [number(run.tokens.value), f"{100 * run.ended.value:.0f} %"]
        spoken = zip((duration, size, amount), run.cost, strict=True)
        row += ["–" if value is None else say(value) for say, value in spoken]
        table.append(row)
    return table


def _against(c: Comparison, i: int, j: int) -> tuple[str, str]:
    """The win rate of run i over run j, and that at equal length."""
    pair = c.pair(i, j)
    shares = pair.win_rate, pair.win_rate_equal_length
    return tuple(rate(share if i == pair.a else share.turned) for share in shares)


def _matrix(c: Comparison) -> list[list[str]]:
    every = range(len(c.runs))
    return [["–" if i == j else _against(c, i, j)[0] for j in every] for i in every]


def _samples(c: Comparison, runs: Sequence[Evaluated]) -> dict[str, Any]:
    """What the page's script shows: prompts, and each run's first answer to them with its scores."""
    kept = slice(0, SHOWN_PROMPTS)
    scores = [*filter(None, (c.score, c.proxy))]
    return {
        "prompts": [text[:SHOWN_TEXT] for text in runs[0].prompts[kept]],
        "total": len(runs[0].prompts),
        "scores": scores,
        "runs": [
            {
                "name": run.name,
                "responses": [text[:SHOWN_TEXT] for text in run.responses[kept]],
                "scores": [
                    [_rounded(float(run.first(score)[p])) for score in scores]
                    for p in range(*kept.indices(len(run.keys)))
                ],
            }
            for run in runs
        ],
        "duels": {f"{pair.a},{pair.b}": duel_words(c, pair.a, pair.b) for pair in c.pairs},
        "start": [c.best(group) for group in c.groups][:2],
    }


def _training(run: Evaluated) -> Path | None:
    """The folder of the training run, where it is still there with its metrics."""
    training = run.about.training
    folder = Path(training.run) if training and training.run else None
    return folder if folder and (folder / "metrics.jsonl").is_file() else None


def _plain(value: Any) -> Any:
    """Named tuples as JSON objects."""
    if hasattr(value, "_asdict"):
        return {name: _plain(entry) for name, entry in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return _rounded(value) if isinstance(value, float) else value


def _rounded(x: float) -> float | None:
    """Nine digits: what lies beyond depends on the order in which a machine adds."""
    return float(f"{x:.9g}") if math.isfinite(x) else None


def _measured(found: dict[str, float | None]) -> str:
    """A measure with its interval, where align.evaluate gave them."""
    value, low, high = (found.get(key) for key in ("value", "low", "high"))
    known = [math.nan if x is None else float(x) for x in (value, low, high)]
    return ranged(Estimate(*known, 0))


def _counts(found: dict[str, Any]) -> str:
    """What a judge counted, in words."""
    told = (f"{name} {_counts(n) if isinstance(n, dict) else n}".replace("_", " ") for name, n in found.items())
    return ", ".join(told)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
