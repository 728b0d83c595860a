"""The data card of a set, of its rows as they were read and as they were written: card.json, and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.data.preparing.card.card import Card
from align.data.preparing.output import Files
from align.data.preparing.pipeline import Outcome
from align.data.preparing.steps import Plan
from align.recipe.load import dump_recipe
from align.recipe.records import to_json
from align.recipe.section import Section
from align.tools.preparing.page import page

CARD, PAGE = "card.json", "report.html"


def write_cards(
    folder: Path, plan: Plan, outcome: Outcome, report: Sequence[dict[str, Any]], files: Files, recipe: Section
) -> None:
    """Both files into `folder`; `report` is what each step did."""
    card = Card([source.path for source in plan.sources], plan.tools.tokens and plan.tools.tokens())
    batches = [about["observed"][f"{card.name}/read"] for about in outcome.spool.batches if "observed" in about]
    cards = {"read": card.merge(batches), "written": card.merge([part[card.name] for part in files.observed])}
    (folder / CARD).write_text(to_json(cards, indent=1) + "\n", "utf-8")
    html = page(Path(recipe.run).name, report, cards, dump_recipe(recipe))
    (folder / PAGE).write_bytes(html.encode("utf-8", "replace"))
