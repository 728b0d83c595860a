"""What was done to a set, on one page that opens offline: rows from step to step, and the data card before and after.

The same set gives the same page, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.data.formats.shown import shown
from align.training.report.plots import COLOURS, SERIES, Panel, amount, new_axes, pages_of, percent, svg_of, value

SHOWN = 12  # rows of a table of counts; the rest is added up
EXAMPLES = 12  # of what a step took

Card = Mapping[str, Any]  # as `card.py` merges it


class Bar(NamedTuple):
    """A row of a table of counts: before the steps, and after."""

    name: str
    counts: tuple[int | None, ...]
    shares: tuple[float, ...]  # of the largest count, for drawing


def page(name: str, report: Sequence[Mapping[str, Any]], cards: Mapping[str, Card], recipe: str) -> str:
    """The page of a set called `name`.

    `report`: what each step did, in order, as `pipeline.reported` has it. `cards`: of the rows as they were `read`, and
    `written` where a set was. `recipe`: as YAML.
    """
    read, written = cards["read"], cards.get("written")
    return (
        pages_of(Path(__file__).parent, amount=amount, value=value, percent=percent, shown=shown)
        .get_template("page.html.jinja")
        .render(
            name=shown(name),
            facts=facts(read, written),
            words=words(read, written),
            steps=[dict(step) | {"taken": sum(step["dropped"].values())} for step in report],
            mix=next((step["found"] for step in report if step["name"] == "mix"), None),
            lengths=lengths_panel(cards),
            tables=tables(cards),
            cards=cards,
            examples=EXAMPLES,
            recipe=recipe,
        )
    )


def facts(read: Card, written: Card | None) -> list[tuple[str, str, str]]:
    """The headline's figures: what, how much, and a note."""
    found = [("Rows read", amount(read["rows"]), f"{amount(read['invalid'])} more records were no rows")]
    if written:
        share = percent(written["rows"] / max(read["rows"], 1))
        found.append(("Rows written", amount(written["rows"]), f"{share} of those read"))
    latest, unit = written or read, read["unit"]
    total = latest["lengths"]["total"]
    found.append((unit.capitalize(), amount(total), f"{amount(read['lengths']['total'])} read" if written else ""))
    if total:
        note = f"longest {value(latest['lengths']['max'])}"
        found.append((f"Median {unit} of a row", value(latest["lengths"]["median"]), note))
    again = latest["duplicates"]["normalised"]
    found.append(("Rows that repeat another", amount(again["rows"]), "but for case, punctuation and blanks"))
    return found


def words(read: Card, written: Card | None) -> list[str]:
    """What the numbers say, in sentences."""
    said = []
    for card, when in ((read, "read"), (written, "written")):
        if card and len(card["labels"]) > 1:
            (most, many), *_, (least, few) = card["labels"].items()
            said.append(
                f"Of the rows {when}, {amount(many)} have the label {shown(most, 40)}, and {amount(few)} the label "
                f"{shown(least, 40)}: {many / max(few, 1):.3g} to 1."
            )
    if read["duplicates"]["exact"]["rows"]:
        exact = read["duplicates"]["exact"]
        said.append(
            f"Of the rows read, {amount(exact['rows'])} are exactly the same as an earlier one; "
            f"the most frequent comes {amount(exact['most'])} times."
        )
    return said


def tables(cards: Mapping[str, Card]) -> list[tuple[str, list[Bar]]]:
    """Counts by name: languages, kinds of rows, turns, labels, sources, and what was wrong or mended."""
    found = []
    for key, title in (
        ("languages", "Languages"), ("kinds", "Kinds of rows"), ("turns", "Turns"), ("labels", "Labels"),
        ("faults", "Records that are no rows"), ("repairs", "Rows that were mended"), ("remarks", "Remarks"),
    ):  # fmt: skip
        counts = [card[key] for card in cards.values()]
        if any(counts):
            found.append((title, bars(counts, by_name=key == "turns")))
    sources = [{source["source"]: source["rows"] for source in card["sources"]} for card in cards.values()]
    found.append(("Sources", bars(sources)))
    return found


def bars(counts: Sequence[Mapping[str, int]], by_name: bool = False) -> list[Bar]:
    """One bar a name, those of the first counts first; the rest in one."""
    names = list(dict.fromkeys(name for each in counts for name in each))
    names = sorted(names, key=int) if by_name else names
    rows = [(name, tuple(each.get(name, 0) for each in counts)) for name in names[:SHOWN]]
    if rest := names[SHOWN:]:
        rows.append((f"{len(rest):,} others", tuple(sum(each.get(n, 0) for n in rest) for each in counts)))
    largest = max((count for _, row in rows for count in row), default=0) or 1
    return [Bar(shown(name, 120), row, tuple(count / largest for count in row)) for name, row in rows]


def lengths_panel(cards: Mapping[str, Card]) -> Panel:
    """Lengths of rows before and after, as histograms over each other."""
    captions, drawn = [], []
    for name, card in cards.items():
        lengths = card["lengths"]
        if not lengths["total"]:
            captions.append(f"{name}: no rows")
            continue
        drawn.append((len(captions), lengths))
        captions.append(
            f"{name}: median {value(lengths['median'])}, 90 % up to {value(lengths['p90'])}, 99 % up to "
            f"{value(lengths['p99'])}, longest {value(lengths['max'])} {card['unit']}"
        )
    title = f"Lengths of rows in {cards['read']['unit']}"
    if not drawn:
        return Panel(title, None, captions)
    figure, axes = new_axes()
    for number, lengths in drawn:
        counts, edges = np.array(lengths["counts"]), np.array(lengths["edges"])
        axes.stairs(counts, edges, fill=True, color=SERIES[number % COLOURS], alpha=0.35)
        axes.stairs(counts, edges, color=SERIES[number % COLOURS], lw=1.5)
    axes.set_ylim(bottom=0)
    return Panel(title, svg_of(figure, f"{title}. {'. '.join(captions)}"), captions)
