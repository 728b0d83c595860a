"""What a worker does with a batch: rows out of records, through the row steps, and a sketch of each that is left."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from align.data.formats.rows import Row
from align.data.preparing.reading import Batch, items_of
from align.data.preparing.step import Item, Verdict
from align.data.preparing.steps import Plan, Steps, steps_of
from align.data.preparing.written import shapes
from align.recipe.records import to_json

EXAMPLES = 3  # of each reason that a batch brings along
MOST_REASONS = 200  # of a step that a batch counts by name
FOUND = re.compile(r"found the (text|list|object|number) .*", re.DOTALL)


class Done(NamedTuple):
    """What became of a batch."""

    rows: list[bytes]  # (n,) items that are left, as JSON
    columns: dict[str, np.ndarray]  # of these: `number`, `source`, `line`, `file`, `shapes`, and `<step>:<sketch>`
    files: list[str]  # that `file` counts in
    ledger: bytes  # JSON lines
    tally: dict[str, Any]  # for the report


class Worker:
    """The steps of a plan, made once and used for batch after batch."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.steps = plan, steps_of(plan)

    def __call__(self, batch: Batch) -> Done:
        """One batch. Raises UserError as the steps do."""
        plan, steps = self.plan, self.steps
        items, faults = items_of(batch, plan.sources, plan.formats, plan.columns)
        if plan.preparation.privacy:  # a value that is shown cut off may be private, and not be found any more
            faults = [
                fault._replace(reason=FOUND.sub(r"found a \1", steps.hide(fault.reason, None))) for fault in faults
            ]
        records = {item.number: item.record for item in items}
        tally = Tally(len(batch), steps)
        tally.ledger += [entry(*fault[:2], "dropped", f"invalid: {fault.reason}") for fault in faults]
        tally.faults = [list(fault) for fault in faults[:EXAMPLES]]
        tally.invalid = len(faults)
        tally.observe("read", items, faults)
        for item in items:
            tally.ledger += [entry(item.row.file, item.row.line, "repaired", words) for words in item.row.repairs]
            tally.remarks.update((item.row.file, remark) for remark in item.row.remarks)
        for step in steps.rows:
            verdicts = step.look(items)
            assert len(verdicts) == len(items), f"{step.name}: one verdict an item"
            tally.add(step.name, items, verdicts)
            items = [verdict.item for verdict in verdicts if verdict.item is not None]
        files = list(dict.fromkeys(item.row.file for item in items))
        columns = {
            "number": np.array([item.number for item in items], np.int64),
            "source": np.array([item.source for item in items], np.int16),
            "line": np.array([item.row.line for item in items], np.int64),
            "file": np.array([files.index(item.row.file) for item in items], np.int32),
            **shapes(items, plan.kept or ()),
        }
        for step in steps.sets:
            if step.where == "workers":
                given = [item._replace(record=records[item.number]) for item in items] if step.raw else items
                columns |= {f"{step.name}:{name}": array for name, array in step.sketch(given).items()}
        return Done([packed(item) for item in items], columns, files, "".join(tally.ledger).encode(), tally.record())


class Tally:
    """What the steps did with a batch."""

    def __init__(self, records: int, steps: Steps) -> None:
        self.records, self.steps, self.invalid = records, steps, 0
        self.ledger, self.faults = list[str](), list[list[Any]]()
        self.remarks: Counter[tuple[str, str]] = Counter()
        self.told: dict[str, dict[str, Any]] = {}
        self.observed: dict[str, dict[str, Any]] = {}

    def add(self, name: str, items: list[Item], verdicts: list[Verdict]) -> None:
        """A row step's verdicts."""
        dropped, changed, found, examples = Counter[str](), 0, Counter[str](), list[list[Any]]()
        for item, verdict in zip(items, verdicts, strict=True):
            place = item.row.file, item.row.line
            if verdict.item is None:
                reason, example = self.steps.hide(verdict.reason, None), self.steps.hide(verdict.example, item)
                self.ledger.append(entry(*place, "dropped", f"{name}: {reason}", example))
                dropped[reason if len(dropped) < MOST_REASONS or reason in dropped else "other reasons"] += 1
                if dropped[reason] <= EXAMPLES:
                    examples.append([*place, reason, example])
            elif verdict.counts:
                changed += 1
                found.update(verdict.counts)
                words = ", ".join(f"{count:,} {kind}" for kind, count in verdict.counts.items())
                self.ledger.append(entry(*place, "changed", f"{name}: {words}"))
                if changed <= EXAMPLES:
                    examples.append([*place, words, verdict.example])
        self.told[name] = {"dropped": dropped, "changed": changed, "found": found, "examples": examples}

    def observe(self, when: str, items: list[Item], faults: list) -> None:
        """What the observers count."""
        for observer in self.steps.observers:
            self.observed[f"{observer.name}/{when}"] = observer.observe(items, faults)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "records": self.records,
            "invalid": self.invalid,
            "faults": self.faults,
            "remarks": [[*key, count] for key, count in self.remarks.items()],
            "steps": self.told,
            "observed": self.observed,
        }


def entry(file: str, line: int, action: str, reason: str, example: str = "") -> str:
    """A line of the ledger."""
    about = {"file": file, "line": line, "action": action, "reason": reason}
    return to_json(about | ({"example": example} if example else {})) + "\n"


def packed(item: Item) -> bytes:
    """An item as a line of JSON."""
    parts = [item.number, item.source, item.kind, item.row._asdict(), item.record]
    return json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"  # of names of files


def unpacked(line: bytes) -> Item:
    """The item again."""
    number, source, kind, row, record = json.loads(line.decode("utf-8", "surrogatepass"))
    row |= {name: tuple(row[name]) for name in ("repairs", "answers", "targets", "remarks")}
    return Item(number, source, kind, Row(**row), record)
