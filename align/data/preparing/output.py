"""The set on the disk: shards of each side and kind of rows, the ledger, and the manifest, which is written last.

Everything stands in a folder beside until it is whole, and is then renamed into its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.data.preparing.engine import Engine
from align.data.preparing.pipeline import LEDGER, Outcome, Tell, edited
from align.data.preparing.spool import Spool
from align.data.preparing.steps import Plan, steps_of
from align.data.preparing.work import entry, unpacked
from align.data.preparing.written import KINDS, as_jsonl, as_parquet, as_row
from align.recipe.preparing.output import Output

SHARD_BYTES = 64_000_000  # of rows as JSON, at which a shard ends


class Shard(NamedTuple):
    """What a worker makes one file of."""

    name: str  # `train/pairs-00000.parquet`
    kind: int
    lines: list[bytes]  # packed items
    times: list[int]
    cuts: list[dict[str, np.ndarray]]  # see Outcome.cuts
    extra: int  # bits, see written.py
    kept: dict[str, int]


class Written(NamedTuple):
    """One file, and what became of its rows."""

    name: str
    data: bytes
    rows: int
    ledger: str
    cut: dict[str, int]  # rows that a step has cut, by its name
    lost: dict[str, int]  # rows of which nothing is left, by the step's name
    observed: dict[str, dict[str, Any]]


class Writer:
    """Makes the files."""

    def __init__(self, plan: Plan, output: Output) -> None:
        self.output, self.steps = output, steps_of(plan)

    def __call__(self, shard: Shard) -> Written:
        """One file. The items of rows are cut here, and written as often as they are wanted."""
        rows, items, ledger, cut, lost = [], [], [], Counter[str](), Counter[str]()
        for line, times, cuts in zip(shard.lines, shard.times, shard.cuts, strict=True):
            whole = unpacked(line)
            item, notes = edited(whole, self.steps.sets, cuts)
            for step, words in notes:
                action = "changed" if item is not None else "dropped"
                ledger.append(entry(whole.row.file, whole.row.line, action, f"{step}: {words}"))
                (cut if item is not None else lost)[step] += 1
            if item is not None:
                items += [item] * times
                rows += [as_row(item, self.output.keep)] * times
        data = as_jsonl(rows)
        if self.output.format == "parquet":
            data = as_parquet(rows, KINDS[shard.kind], shard.extra, shard.kept)
        observed = {observer.name: observer.observe(items, []) for observer in self.steps.observers}
        return Written(shard.name, data, len(rows), "".join(ledger), dict(cut), dict(lost), observed)


class Files(NamedTuple):
    """What was written."""

    sides: dict[str, list[dict[str, Any]]]  # files of each side: name, rows, bytes, hash
    cut: dict[str, int]
    lost: dict[str, int]
    observed: list[dict[str, Any]]


def write(outcome: Outcome, plan: Plan, output: Output, folder: Path, engine: Engine, tell: Tell) -> Files:
    """All shards and the ledger into `folder`. Files that a killed run has written, and noted, are left."""
    noted = Spool(folder / "noted")
    tasks = (shard for number, shard in enumerate(shards(outcome, output)) if number >= len(noted.batches))
    rows = sum(about["rows"] for about in noted.batches)
    for file in engine(Writer, (plan, output), tasks):
        path = folder / "set" / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
        about = {"name": file.name, "rows": file.rows, "bytes": len(file.data)}
        about["sha256"] = sha256(file.data).hexdigest()
        told = {"cut": file.cut, "lost": file.lost, "observed": file.observed}
        noted.add(about | told, {}, {LEDGER: file.ledger.encode()})
        rows += file.rows
        tell("writing", rows)
    (folder / "set").mkdir(exist_ok=True)
    with (folder / "set" / LEDGER).open("wb") as ledger:
        ledger.write(outcome.spool.blob(LEDGER))
        ledger.writelines(line.encode() for line in outcome.ledger())
        ledger.write(noted.blob(LEDGER))
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in outcome.sides}
    cut, lost = Counter[str](), Counter[str]()
    for about in noted.batches:
        file = {key: about[key] for key in ("name", "rows", "bytes", "sha256")}
        sides[about["name"].partition("/")[0]].append(file)
        cut.update(about["cut"])
        lost.update(about["lost"])
    return Files(sides, dict(cut), dict(lost), [about["observed"] for about in noted.batches])


def shards(outcome: Outcome, output: Output) -> Iterator[Shard]:
    """The files of the set, in their order: side by side, kind by kind, row by row as the sources have them."""
    spool = outcome.spool
    kind, extra, starts = spool.column("kind"), spool.column("extra"), spool.column("rows.starts")
    alive = outcome.alive & (outcome.times > 0)
    sizes = np.diff(np.append(starts, spool.ends.get("rows.jsonl", 0)))
    for number, side in enumerate(outcome.sides):
        for code, name in enumerate(KINDS):
            of_kind = alive & (kind == code)
            places = np.flatnonzero(of_kind & (outcome.side == number))
            if not len(places):
                continue
            bits = int(np.bitwise_or.reduce(extra[of_kind]))
            kept = {
                column: int(np.bitwise_or.reduce(spool.column(f"kept:{column}")[of_kind])) for column in output.keep
            }
            times = outcome.times[places]
            for i, mine in enumerate(_cut(times, sizes[places] * times, output.shard_rows)):
                rows = places[mine]
                yield Shard(
                    f"{side}/{name}-{i:05}.{output.format}",
                    code,
                    list(spool.rows(rows)),
                    outcome.times[rows].tolist(),
                    [outcome.cuts(row) for row in rows],
                    bits,
                    kept,
                )


def _cut(times: np.ndarray, sizes: np.ndarray, most: int) -> Iterator[slice]:
    """Consecutive rows of each shard: at most so many written rows, and SHARD_BYTES, unless one row alone has more."""
    first, rows, size = 0, 0, 0
    for i, (count, more) in enumerate(zip(times.tolist(), sizes.tolist(), strict=True)):
        if i > first and (rows + count > most or size + more > SHARD_BYTES):
            yield slice(first, i)
            first, rows, size = i, 0, 0
        rows, size = rows + count, size + more
    yield slice(first, len(times))
