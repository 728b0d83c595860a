"""Sources as batches of consecutive records, and batches as items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.data.files.lines import Broken, Record
from align.data.formats.answers import COMPARED, JUDGED
from align.data.formats.formats import FORMATS, converted, find, records_of
from align.data.formats.labels import formats as labelled
from align.data.formats.prompts import PROMPTING
from align.data.formats.rows import Fault, Formats, Row
from align.data.formats.values import DEEP, encodable, is_deep
from align.data.preparing.step import Item, Kind
from align.recipe.schema import Source

ALL: Formats = {  # whatever some stage reads, each row as the stage that learns most from it has it
    **COMPARED,
    **JUDGED,
    **labelled(None),
    **{name: shape for name, shape in FORMATS.items() if name != "text"},
    "text": FORMATS["text"],
    "prompts": PROMPTING["prompts"],
}
RECORDS = 512  # of a batch at most
CHARACTERS = 4_000_000  # of the records of a batch at most, unless one alone has more


class Segment(NamedTuple):
    """Records of one file."""

    source: int  # place of the source in the recipe
    file: str
    format: str
    records: list[Record]


class Batch(NamedTuple):
    """Consecutive records of all sources. Its bounds depend on the records alone."""

    number: int  # from 0
    first: int  # `Item.number` of its first record
    segments: list[Segment]

    def __len__(self) -> int:
        return sum(len(segment.records) for segment in self.segments)


def batches(sources: Sequence[Source], formats: Formats) -> Iterator[Batch]:
    """All records of the sources in their order, streamed. Raises UserError as `read_rows` does."""
    number, first, segments, count, size = 0, 0, list[Segment](), 0, 0
    for place, source in enumerate(sources):
        left = source.limit
        for found in find(source, formats):
            for record in records_of(source, found.file):
                if left == 0:
                    break
                left = None if left is None else left - 1
                more = characters(record[1])
                if count and (count == RECORDS or size + more > CHARACTERS):
                    yield Batch(number, first, segments)
                    number, first, segments, count, size = number + 1, first + count, [], 0, 0
                if not segments or segments[-1][:2] != (place, found.file):
                    segments.append(Segment(place, found.file, found.format, []))
                segments[-1].records.append(record)
                count, size = count + 1, size + more
    if count:
        yield Batch(number, first, segments)


def items_of(
    batch: Batch, sources: Sequence[Source], formats: Formats, kept: Sequence[str] | None
) -> tuple[list[Item], list[Fault]]:
    """The rows of a batch, and the records that are none; `kept`: columns of the record that items have (None: all that
    JSON can hold)."""
    items, faults, number = [], [], batch.first
    for segment in batch.segments:
        source = sources[segment.source]
        for line, value in segment.records:
            record, row = converted(value, source, segment.format, segment.file, line, formats)
            if isinstance(row, Row) and is_deep(record):
                faults.append(Fault(segment.file, line, DEEP))
            elif isinstance(row, Row):
                items.append(Item(number, segment.source, kind_of(row), row, _kept(record, value, kept)))
            else:
                faults.append(row)
            number += 1
    return items, faults


def kind_of(row: Row) -> Kind:
    """What is written of a row."""
    if row.text is not None:
        return "text" if row.label is None else "classes"
    if not row.answers:
        return "messages" if row.messages[-1]["role"] == "assistant" else "prompts"
    return {1: "labelled", 2: "pairs"}.get(len(row.answers), "ranked")


def characters(value: Any) -> int:
    """About how much a record holds."""
    total, left = 0, [value]
    while left:
        each = left.pop()
        each = each.reason if isinstance(each, Broken) else each
        total += len(each) if isinstance(each, str | bytes) else 8
        left += each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else ()
    return total


def _kept(record: Mapping[str, Any], raw: Mapping[str, Any], kept: Sequence[str] | None) -> dict[str, Any]:
    """Columns under the format's names, or else under the file's own."""
    if kept is None:
        return {name: value for name, value in record.items() if _is_json(value)}
    found = {name: record[name] if name in record else raw.get(name) for name in kept}
    return {name: value if _is_json(value) else str(value) for name, value in found.items() if value is not None}


def _is_json(value: Any) -> bool:
    if value is None or isinstance(value, bool | int):
        return True
    try:
        encodable("", value)
    except Exception:  # Refused, or nested too deeply
        return False
    return True
