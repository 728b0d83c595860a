"""The same steps inside a stage: its rows to train on pass them before they become tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from align.data.examples import Ledger
from align.data.formats.rows import Formats, Row
from align.data.preparing.engine import local
from align.data.preparing.pipeline import LEDGER, Outcome, check_valid, decided, edited, kept_items
from align.data.preparing.steps import Plan, Tools
from align.data.preparing.work import entry, unpacked
from align.data.store import content_of
from align.recipe.errors import UserError
from align.recipe.functions import Border
from align.recipe.locks import alone
from align.recipe.schema import Data

VERSION = 1  # of what the steps make of rows: raise it when that changes


class Cleaned:
    """The rows that are left of all sources of a stage."""

    def __init__(self, outcome: Outcome, key: str) -> None:
        self.outcome, self.key = outcome, key

    def source(self, place: int) -> CleanedSource:
        """Those of one source."""
        return CleanedSource(self, place)

    def enter(self, ledger: Ledger) -> None:
        """Write what became of rows into a run's ledger."""
        lines = self.outcome.spool.blob(LEDGER).decode().split("\n")
        for line in (*lines, *self.outcome.ledger(), *self._cuts()):
            about = json.loads(line) if line else {}
            if about.get("action") == "dropped":
                ledger.lose(about["file"], about["line"], about["reason"].partition(":")[0], about["reason"])
            elif about.get("action") == "changed":  # repairs are told by the store, which reads the row again
                ledger.add(about["file"], about["line"], "changed", about["reason"])

    def _cuts(self) -> Iterator[str]:
        """Of rows that set steps cut, in their order."""
        outcome = self.outcome
        places = [row for row in outcome.alive.nonzero()[0] if outcome.cuts(row)]
        for row, line in zip(places, outcome.spool.rows(places), strict=True):
            item, notes = edited(unpacked(line), outcome.steps, outcome.cuts(row))
            action = "changed" if item is not None else "dropped"
            yield from (entry(*outcome.place(row), action, f"{step}: {words}") for step, words in notes)


class CleanedSource:
    """The rows that are left of one source."""

    def __init__(self, cleaned: Cleaned, place: int) -> None:
        self.cleaned, self.place = cleaned, place
        self.key = [cleaned.key, place]  # all that they depend on

    def rows(self) -> Iterator[Row]:
        """In the order of the source."""
        return (row for _, row in self.records())

    def records(self) -> Iterator[tuple[dict[str, Any], Row]]:
        """The same with their records, as the steps left them."""
        return ((item.record, item.row) for item in kept_items(self.cleaned.outcome, self.place))


def cleaned(
    data: Data, formats: Formats, seed: int, cache: Path, border: Border | None, tell: Callable[[str, int], Any]
) -> Cleaned:
    """The rows of `data.train` after the steps of `data.prepare`, from the cache or made now, by this process alone.

    Raises UserError for sources that cannot be read, records that are no rows where those are errors, and steps that
    need a model.
    """
    section = data.prepare
    assert section is not None
    models = {"perplexity": section.filter.perplexity, "scores": section.filter.scores}
    wanted = [f"filter.{name}" for name, asked in models.items() if asked]
    wanted += ["filter.functions"] if section.filter.functions and border is None else []
    if wanted:
        raise UserError(f"data.prepare.{wanted[0]}: a stage does not run it on its rows; run align.prepare before it")
    content = [line for source in data.train for line in content_of(source, formats)]
    sources = [source.model_dump(exclude={"weight"}) for source in data.train]
    about = [VERSION, content, sources, sorted(formats), section.model_dump(), seed]
    key = sha256(json.dumps(about, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    plan = Plan(data.train, formats, section, seed, Tools(border or _none), None)
    folder = cache / "prepared" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{key}.lock")):
        outcome = decided(plan, folder, local(1), (), tell)
        outcome.spool.close()
    check_valid(outcome, data.invalid, "data.invalid")
    return Cleaned(outcome, key)


def _none(told: str, call: Callable[[], Any]) -> Any:
    raise UserError(told)
