"""Rows of any known shape become canonical ones: OpenAI-style messages, or plain text.

A canonical message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}` and, where the row
has them, `tool_calls` ([{"type": "function", "function": {"name": str, "arguments": dict}}], an `id` kept),
`reasoning_content`, `train: False` (an assistant turn given only as context) and, on tool turns, `name` and
`tool_call_id`. Turns stand in the order that the row has them in, an assistant's last; only system turns without a word
are left out, and an assistant's tool calls are followed by at most as many tool turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from align.data.files.files import has_blank_lines, read_file, read_hub
from align.data.files.lines import Broken, Record
from align.data.files.paths import data_files, is_hub_id
from align.data.files.tables import by_place, delimiter_note, header_hint
from align.data.formats.media import text_alone
from align.data.formats.message import Turn
from align.data.formats.naming import check_mapping, renamed, turns_hint
from align.data.formats.rows import Fault, Formats, Refused, Row, Shape
from align.data.formats.shown import a, listed, meant
from align.data.formats.turns import (
    alpaca,
    check,
    keys_of,
    messages,
    prompt_completion,
    remarks_of,
    settled,
    sharegpt,
    thoughts_beside,
    tools_of,
)
from align.data.formats.values import encodable, filled, from_json, shallow, text
from align.data.formats.verdicts import LABELS, learnable
from align.recipe.errors import UserError
from align.recipe.schema import Source

SPEAKER_KEYS = {"role", "from"}
SAMPLE = 16  # first rows of a file, by which its format is told


class Found(NamedTuple):
    """One file of a source and the format its rows have."""

    file: str
    format: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.format} ({self.why})"


def read_rows(source: Source, formats: Formats | None = None) -> Iterator[Row | Fault]:
    """The source's rows in file order, streamed, in one of `formats` (default: conversations and text).

    Raises UserError: before the first row for every file whose beginning fails, later where a file breaks.
    """
    for _, row in read_records(source, formats or FORMATS):
        yield row


def read_records(source: Source, formats: Formats) -> Iterator[tuple[Any, Row | Fault]]:
    """The same with each row's record as the file has it, its columns under the format's names."""
    rows = (_converted(source, found, formats) for found in find(source, formats))
    yield from islice(chain.from_iterable(rows), source.limit)


def describe(source: Source) -> str:
    """One line a file: `data_templates/chat.jsonl: sharegpt (column `conversations` with from/value)`."""
    return "\n".join(map(str, find(source)))


def find(source: Source, formats: Formats | None = None) -> list[Found]:
    """The files of a source and their formats, by their first rows. Raises UserError with every problem."""
    formats = formats or FORMATS
    if source.format not in ("auto", *formats):
        raise UserError(
            f"{source.path}: this stage takes no rows of format {source.format}; it reads {', '.join(formats)}"
        )
    check_mapping(source)
    files = [source.path] if is_hub_id(source.path) else [str(file) for file in data_files(source.path)]
    found, problems = [], []
    for file in files:
        try:
            found.append(_find(source, file, formats))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def _find(source: Source, file: str, formats: Formats) -> Found:
    sample = list(islice(records_of(source, file), SAMPLE))
    if not sample:
        raise UserError(f"{file}: holds no rows")
    rows = [value for _, value in sample if isinstance(value, dict)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    known = formats if source.format == "auto" else {source.format: formats[source.format]}
    names = sorted({name for shape in known.values() for name in (*shape.needs, *shape.may)})
    problems = [
        f"{file}: `columns` maps the unknown '{name}'{meant(name, names)}; expected {listed(names)}"
        for name, column in source.columns.items()
        if name not in names and column is not None
    ]
    if rows:
        problems += [
            f"{file}: no column '{column}' to map{meant(column, columns)}; it has {listed(columns)}"
            for column in source.columns.values()
            if column is not None and column not in columns
        ]
    if problems:
        raise UserError(*problems)
    raw, rows = rows, [renamed(row, source) for row in rows]
    if source.format == "auto":
        format, why = detect(rows, formats)
        if format is None:
            if rows:
                raise UserError(f"{file}: {why}{turns_hint(raw)}{header_hint(columns)}")
            line, value = sample[0]  # where no row is one, the first tells more than the columns
            raise UserError(f"{file}:{line}: {_refusal(value)}")
    else:
        format, shape = source.format, formats[source.format]
        why = "as the recipe says" + shape.note
        lacking = [name for name in shape.needs if rows and not any(name in shape.named(row) for row in rows)]
        if lacking:
            raise UserError(
                f"{file}: format {format} needs {shape.wanted}, the file has {listed(columns)}"
                f"; name another format, or map its columns: `columns: {{{lacking[0]}: <a column>}}`"
            )
    if format == "text" and file.removesuffix(".gz").endswith(".txt"):
        why = "documents parted by blank lines" if has_blank_lines(Path(file)) else "one document a line"
    if not is_hub_id(file):
        why += delimiter_note(Path(file), by_place(source.columns))
    return Found(file, format, why)


def detect(rows: list[dict[str, Any]], formats: Formats | None = None) -> tuple[str | None, str]:
    """The format of some rows and the columns that tell it, or None and why it cannot be told.

    Where several fit, the one with the most structure is taken and the others are named.
    """
    formats = formats or FORMATS
    columns = list(dict.fromkeys(name for row in rows for name in row))
    fits = {}
    for name, shape in formats.items():
        given = {shape.also[column]: column for column in columns if column in shape.also}
        given |= {column: column for column in columns}
        either = [given[column] for column in shape.either if column in given]
        there = all(need in given for need in shape.needs) and (either or not shape.either)
        if not there:
            continue
        named = [shape.named(row) for row in rows]
        spoken = _keys(named, shape) if shape.keys else ""
        if spoken is not None and any(map(shape.when, rows)):
            told = [given[need] for need in shape.needs] + either[:1]
            keys = f" with {spoken}" if spoken else ""
            fits[name] = f"column{'s' * (len(told) > 1)} {listed(told)}{keys}"
    if fits:
        (name, why), *others = fits.items()
        others = "".join(f"; it could be {other} too: {reason}" for other, reason in others)
        return name, why + formats[name].note + others
    needs = "; ".join(f"{name} needs {shape.wanted}" for name, shape in formats.items())
    return None, (
        f"no format fits its columns {listed(columns)}: {needs}; name the format, or map the columns:"
        " `columns: {<the format's name>: <the file's>}`"
    )


def convert(row: Any, format: str, file: str, line: int, formats: Formats | None = None) -> Row | Fault:
    """One record, its columns already under the format's names, as a canonical row or the reason why not."""
    try:
        if not isinstance(row, dict):
            raise Refused(_refusal(row))
        shape = (formats or FORMATS)[format]
        text_alone("", row)
        return shallow(shape.read(shape.named(row)))._replace(file=file, line=line)
    except Refused as refused:
        return Fault(file, line, str(refused))
    except RecursionError:
        return Fault(file, line, "expected a row of text and lists, found one nested too deeply to read")


def _refusal(record: Any) -> str:
    return record.reason if isinstance(record, Broken) else f"expected a row of named columns, found {a(record)}"


def system_of(row: dict[str, Any]) -> list[Turn]:
    """The `system` column as a turn, where a row has one."""
    if not row.get("system"):
        return []
    return [Turn("system", "system", {"role": "system", "content": text("system", row["system"])})]


def _talk(last: str, read: Callable[[dict[str, Any]], list[Turn]], row: dict[str, Any]) -> Row:
    """A conversation; `last` is the column that its last answer stands in."""
    learnable(row)
    turns, repairs = settled(system_of(row) + read(row))
    kept = turns[: max((i for i, t in enumerate(turns, 1) if t.message["role"] == "assistant"), default=0)]
    if not kept:
        raise Refused(f"{last}: expected an assistant turn to learn from, found none")
    check(kept)
    cut = len(turns) - len(kept)
    repairs += (f"cut {cut} turn{'s' * (cut > 1)} after the last assistant turn",) if cut else ()
    messages = encodable("messages", [turn.message for turn in kept])
    tools = encodable("tools", tools_of(row.get("tools")))
    return Row("", 0, messages, None, tools, repairs, remarks=remarks_of(turns) + thoughts_beside(row))


def _text(row: dict[str, Any]) -> Row:
    return Row("", 0, None, encodable("text", filled("text", row.get("text"))), None)


_MAY = ("system", "tools", *LABELS)

FORMATS: Formats = {  # of conversations and text
    "messages": Shape(("messages",), ("loss_mask", *_MAY), ("role", "content"), partial(_talk, "messages", messages)),
    "sharegpt": Shape(
        ("conversations",), ("loss_mask", *_MAY), ("from", "value"), partial(_talk, "conversations", sharegpt)
    ),
    "alpaca": Shape(("instruction", "output"), ("input", "history", *_MAY), (), partial(_talk, "output", alpaca)),
    "prompt_completion": Shape(("prompt", "completion"), _MAY, (), partial(_talk, "completion", prompt_completion)),
    "text": Shape(("text",), (), (), _text),
}


def _keys(rows: Iterable[dict[str, Any]], shape: Shape) -> str | None:
    """How the turns of some row name role and content, or a transcript its speakers; None where none does.

    A `content` may be missing, a role may not.
    """
    for row in rows:
        turns = row.get(shape.needs[0])
        if isinstance(turns, str) and turns.lstrip().startswith(shape.keys[0]):
            return "/".join(shape.keys)
        try:
            turns = from_json(shape.needs[0], turns)
        except Refused:
            continue
        spoken = isinstance(turns, list) and shape.keys[0] in SPEAKER_KEYS
        if spoken and any(isinstance(turn, dict) and turn.keys() & SPEAKER_KEYS for turn in turns):
            return "/".join(keys_of(turns))
    return None


def _converted(source: Source, found: Found, formats: Formats) -> Iterator[tuple[Any, Row | Fault]]:
    for line, value in records_of(source, found.file):
        yield converted(value, source, found.format, found.file, line, formats)


def converted(
    value: Any, source: Source, format: str, file: str, line: int, formats: Formats
) -> tuple[Any, Row | Fault]:
    """A record of a source's file: with its columns under the format's names, and as a canonical row."""
    row = renamed(value, source) if isinstance(value, dict) else value
    made = convert(row, format, file, line, formats)
    return row, made._replace(control=source.control_tokens) if isinstance(made, Row) else made


def records_of(source: Source, file: str) -> Iterator[Record]:
    """The records of one of a source's files, as the file has them."""
    return read_hub(source) if is_hub_id(file) else read_file(Path(file), source.columns)
