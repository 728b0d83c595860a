"""The pipeline: read, look at each row, then at all, and say of each what becomes of it.

1. Batches of records go to the workers, which convert them, take them through the row steps and sketch what is left.
2. Steps with a model sketch the rows that are left, in this process.
3. Each set step decides, in its turn, over the sketches of all rows that the ones before have left.

What was found is kept in a spool, so a run that was killed goes on after its last whole batch. What is written of it
is for `output.py` to say, or for a stage, which reads the rows from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.data.preparing.duplicates.groups import Groups
from align.data.preparing.engine import Engine
from align.data.preparing.reading import batches
from align.data.preparing.spool import Part, Spool
from align.data.preparing.step import Decision, Item, SetStep
from align.data.preparing.steps import Plan, steps_of
from align.data.preparing.work import EXAMPLES, Worker, entry, unpacked
from align.recipe.errors import UserError

LEDGER = "ledger.jsonl"
Tell = Callable[[str, int], None]  # (what is going on, rows so far)


class Outcome(NamedTuple):
    """What becomes of every row that the row steps have left: n rows."""

    spool: Spool
    files: list[str]
    steps: list[SetStep]
    decisions: list[Decision]
    alive: np.ndarray  # (n,) bool
    times: np.ndarray  # (n,) int32, how often it is written
    side: np.ndarray  # (n,) int8
    sides: tuple[str, ...]

    def place(self, row: int) -> tuple[str, int]:
        """File and line of a row."""
        return self.files[self.spool.column("file")[row]], int(self.spool.column("line")[row])

    def cuts(self, row: int) -> dict[str, np.ndarray]:
        """What `edit` is to be told of a row, by the name of the step; mostly nothing."""
        found = {}
        for step, decision in zip(self.steps, self.decisions, strict=True):
            if decision.cuts is not None:
                values, starts = decision.cuts
                if starts[row] < starts[row + 1]:
                    found[step.name] = values[starts[row] : starts[row + 1]]
        return found

    def ledger(self) -> Iterator[str]:
        """Lines on the rows that set steps drop, step after step."""
        files, file, line = self.files, self.spool.column("file"), self.spool.column("line")
        for step, decision in zip(self.steps, self.decisions, strict=True):
            if decision.drop is None:
                continue
            for row in np.flatnonzero(decision.drop):
                reason = f"{step.name}: {decision.reasons[decision.drop[row] - 1]}"
                first = -1 if decision.because is None else decision.because[row]
                reason += f": {files[file[first]]}:{line[first]}" if first >= 0 else ""
                yield entry(files[file[row]], int(line[row]), "dropped", reason)


def decided(plan: Plan, folder: Path, engine: Engine, scorers: Sequence[SetStep], tell: Tell) -> Outcome:
    """Everything but the writing. `scorers`: set steps with models, which come first. What comes after the split sees
    the rows of its first side alone. Raises UserError for sources that cannot be read, and as the steps do."""
    steps = [*scorers, *steps_of(plan).sets]
    spool = Spool(folder / "rows")
    files = _looked_at(plan, spool, engine, tell)
    sketched = {step.name: _scored(step, spool, folder, tell) for step in scorers}
    n = len(spool)
    alive, times, side = np.ones(n, bool), np.ones(n, np.int32), np.zeros(n, np.int8)
    groups, sides, decisions = Groups(n), ("train",), list[Decision]()
    for step in steps:
        tell(f"deciding: {step.name}", n)
        sketches = Part(sketched.get(step.name, spool), step.name, spool)
        found = step.decide(sketches, alive & (side == 0), groups.all())
        if found.drop is not None:
            found = found._replace(drop=found.drop * alive)
            alive = alive & (found.drop == 0)
        if found.group is not None:
            groups.join(np.arange(n), found.group)
        if found.times is not None:
            times = np.where(side == 0, found.times, times)
        if found.side is not None:
            side, sides = found.side, found.sides
        decisions.append(found)
    return Outcome(spool, files, steps, decisions, alive, times, side, sides)


def _looked_at(plan: Plan, spool: Spool, engine: Engine, tell: Tell) -> list[str]:
    """Take what is not in the spool yet through the workers; the files of all rows."""
    known = {file: i for i, file in enumerate(file for about in spool.batches for file in about.get("files", ()))}
    records = sum(about.get("records", 0) for about in spool.batches)
    if not spool.batches or "end" not in spool.batches[-1]:
        tasks = islice(batches(plan.sources, plan.formats), len(spool.batches), None)
        for done in engine(Worker, (plan,), tasks):
            new = [file for file in done.files if file not in known]
            known |= {file: i for i, file in enumerate(new, len(known))}
            places = np.array([known[file] for file in done.files], np.int32)
            columns = done.columns | {"file": places[done.columns["file"]]}
            about = done.tally | {"rows": len(done.rows), "files": new}
            spool.add_rows(about, done.rows, columns, **{LEDGER: done.ledger})
            records += done.tally["records"]
            tell("reading", records)
        spool.add({"end": True}, {}, {})
    return list(known)


def _scored(step: SetStep, spool: Spool, folder: Path, tell: Tell) -> Spool:
    """The sketches of a step with a model, batch by batch of what the spool holds."""
    found = Spool(folder / step.name.replace("/", "_"))
    done = sum(about["rows"] for about in found.batches)
    at = 0
    for about in spool.batches:
        count = about.get("rows", 0)
        at += count
        if not count or at <= done:
            continue
        items = list(map(unpacked, spool.rows(np.arange(at - count, at))))
        sketch = step.sketch(items)
        found.add({"rows": count}, {f"{step.name}:{name}": array for name, array in sketch.items()}, {})
        tell(step.name, at)
    return found


def kept_items(outcome: Outcome, source: int | None = None) -> Iterator[Item]:
    """The rows that stay, of one source or of all, in their order, with what is cut out of them."""
    mine = outcome.alive if source is None else outcome.alive & (outcome.spool.column("source") == source)
    places = np.flatnonzero(mine)
    for row, line in zip(places, outcome.spool.rows(places), strict=True):
        item = edited(unpacked(line), outcome.steps, outcome.cuts(row))[0]
        if item is not None:
            yield item


def edited(
    item: Item, steps: Sequence[SetStep], cuts: Mapping[str, np.ndarray]
) -> tuple[Item | None, list[tuple[str, str]]]:
    """An item without what set steps cut out of it, None where nothing is left; and what to note, by step."""
    notes = []
    for step in steps if cuts else ():
        if step.name in cuts:
            verdict = step.edit(item, cuts[step.name])
            words = verdict.reason or ", ".join(f"{count:,} {what} taken out" for what, count in verdict.counts.items())
            notes.append((step.name, words))
            if verdict.item is None:
                return None, notes
            item = verdict.item
    return item, notes


def reported(outcome: Outcome) -> list[dict[str, Any]]:
    """What each step did, in order, as JSON can hold it."""
    merged: dict[str, dict[str, Any]] = {}
    for about in outcome.spool.batches:
        for name, told in about.get("steps", {}).items():
            step = merged.setdefault(name, {"name": name, "dropped": {}, "changed": 0, "found": {}, "examples": []})
            for key in ("dropped", "found"):
                for reason, count in told[key].items():
                    step[key][reason] = step[key].get(reason, 0) + count
            step["changed"] += told["changed"]
            for example in told["examples"]:
                if sum(known[2] == example[2] for known in step["examples"]) < EXAMPLES:
                    step["examples"].append(example)
    found = list(merged.values())
    for step, decision in zip(outcome.steps, outcome.decisions, strict=True):
        dropped, examples = {}, []
        for number, reason in enumerate(decision.reasons, 1):
            rows = np.flatnonzero(decision.drop == number) if decision.drop is not None else []
            dropped |= {reason: len(rows)} if len(rows) else {}
            for row in rows[:EXAMPLES]:
                of = "" if decision.because is None else "{}:{}".format(*outcome.place(decision.because[row]))
                examples.append([*outcome.place(row), reason, of])
        found.append(
            {"name": step.name, "dropped": dropped, "changed": 0, "found": dict(decision.counts), "examples": examples}
        )
    return found


def invalid(outcome: Outcome) -> tuple[int, list[str]]:
    """Records that are no rows: how many, and the first, as `file:line: reason`."""
    faults = [fault for about in outcome.spool.batches for fault in about.get("faults", ())]
    count = sum(about.get("invalid", 0) for about in outcome.spool.batches)
    return count, ["{}:{}: {}".format(*fault) for fault in faults]


def check_valid(outcome: Outcome, how: str, key: str = "invalid") -> None:
    """Raise UserError for records that are no rows, unless they are to be dropped, as the recipe's `key` says."""
    count, first = invalid(outcome)
    if count and how == "error":
        shown = first[:10]
        rest = f"… and {count - len(shown):,} more; " if count > len(shown) else ""
        remedy = f"mend them, or leave them out with {key}=drop"
        raise UserError(*shown, f"{rest}{count:,} row{'s' * (count != 1)} cannot be taken: {remedy}")
