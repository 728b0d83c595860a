"""What was done to a set, in lines for the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.preparing.output import Files
from align.data.preparing.pipeline import Outcome, invalid

SHOWN = 5  # reasons of a step


def told(outcome: Outcome, report: Sequence[dict[str, Any]], files: Files | None) -> list[str]:
    """Records read, what each step took, and the sides that were written, if they were."""
    records = sum(about.get("records", 0) for about in outcome.spool.batches)
    faults, first = invalid(outcome)
    lines = [f"{records:,} records read, {faults:,} of them no row"]
    lines += [f"  {fault}" for fault in first[:SHOWN]]
    for step in report:
        lines += _step(step)
    if files is None:
        left = int(outcome.alive.sum())
        return [*lines, f"dry run: {left:,} rows would stay"]
    for name, count in (files.cut | files.lost).items():
        lines.append(f"{name}: {count:,} rows cut, {files.lost.get(name, 0):,} with nothing left dropped")
    for side, written in files.sides.items():
        kinds: dict[str, int] = {}
        for file in written:
            kind = file["name"].partition("/")[2].rpartition("-")[0]
            kinds[kind] = kinds.get(kind, 0) + file["rows"]
        rows = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) or "no rows"
        lines.append(f"{side}: {rows} in {len(written):,} file{'s' * (len(written) != 1)}")
    return lines


def _step(step: dict[str, Any]) -> list[str]:
    dropped = sorted(step["dropped"].items(), key=lambda item: -item[1])
    parts = [f"{sum(step['dropped'].values()):,} dropped"] if dropped or not step["changed"] else []
    parts += [f"{step['changed']:,} changed"] if step["changed"] else []
    counts = {name: count for name, count in step["found"].items() if isinstance(count, int | float)}
    parts += [f"{count:,} {name}" for name, count in counts.items()]
    lines = [f"{step['name']}: {', '.join(parts)}"]
    for reason, count in dropped[:SHOWN]:
        example = next((one for one in step["examples"] if one[2] == reason), None)
        where = f" (first: {example[0]}:{example[1]}{f', {example[3]}' if example[3] else ''})" if example else ""
        lines.append(f"  {count:,} {reason}{where}")
    if len(dropped) > SHOWN:
        lines.append(f"  … and {len(dropped) - SHOWN:,} more reasons")
    return lines
