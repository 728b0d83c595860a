"""Text streams as numbered records: lines, JSON lines, and JSON arrays that are parsed as they are read.

A record is `(line, value)`: the 1-based line where it starts and the value read there, or `Broken` where the
syntax fails on that line alone. What breaks all that follows is a `UserError` with file and line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

from align.recipe.errors import UserError


class Broken(NamedTuple):
    """A record that could not be read although its neighbours can."""

    reason: str


Record = tuple[int, Any]  # (line, dict | Broken | any other JSON value)

SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 1 << 16  # bytes of a JSON array read at once; more only for a row that is longer


class _Parser:
    """JSON in which no object says one key twice: which of both is meant, nobody knows."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._once)

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice.append(next(name for at, name in enumerate(names) if name in names[:at]))
        return made

    def at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that starts there, or `Broken`, and where it ends."""
        self._twice.clear()
        value, end = self._json.raw_decode(text, start)
        return self._clear(value), end

    def whole(self, text: str) -> Any:
        """The one value of this text, or `Broken`."""
        self._twice.clear()
        return self._clear(self._json.decode(text))

    def _clear(self, value: Any) -> Any:
        return Broken(f"the key '{self._twice[0]}' stands twice in one object") if self._twice else value


def lines_of(stream: BinaryIO, file: str) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded one at a time so that broken UTF-8 has a line."""
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(file, number, error)) from error
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def json_lines(stream: BinaryIO, file: str) -> Iterator[Record]:
    """One value a line; empty lines are passed over. A line that is not JSON, or not UTF-8, is `Broken`."""
    parser = _Parser()
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield number, Broken(_undecodable(error))
            continue
        if not line.strip():
            continue
        if line.strip() == "{":
            raise UserError(f"{file}:{number}: a row spans several lines; expected an array of rows or one row a line")
        try:
            yield number, parser.whole(line)
        except json.JSONDecodeError as error:
            yield number, Broken(f"broken JSON at column {error.colno}: {error.msg}")
        except (ValueError, RecursionError) as error:
            yield number, Broken(f"broken JSON: {error}")


def json_array(stream: BinaryIO, file: str) -> Iterator[Record]:
    """Elements of a JSON array with the line where each starts, parsed chunk by chunk.

    Raises UserError with line and column where the array breaks: what follows cannot be trusted.
    """
    text = _Window(stream, file)
    text.skip_space()
    text.expect("[")
    text.skip_space()
    while text.peek() != "]":
        yield text.line, text.value()
        text.skip_space()
        if text.peek() != "]":
            text.expect(",")
            text.skip_space()
    text.expect("]")
    text.skip_space()
    if text.peek():
        text.fail("found more text after the array's end")


class _Window:
    """A sliding view of a text stream: `text[at:]` is not yet parsed, and starts at `line` and `column`."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self.stream, self.file = stream, file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.parser = _Parser()
        self.text, self.at, self.line, self.column, self.ended = "", 0, 1, 1, False

    def grow(self, size: int = CHUNK) -> None:
        raw = self.stream.read(size)
        self.ended = not raw
        try:
            new = self.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            before = self.text.count("\n", self.at) + error.object[: error.start].count(b"\n")
            raise UserError(_not_utf8(self.file, self.line + before, error)) from error
        self.text, self.at = self.text[self.at :] + new, 0

    def advance(self, to: int) -> None:
        newlines = self.text.count("\n", self.at, to)
        self.line += newlines
        self.column = to - self.text.rfind("\n", self.at, to) if newlines else self.column + to - self.at
        self.at = to

    def peek(self) -> str:
        while self.at == len(self.text) and not self.ended:
            self.grow()
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> None:
        while self.peek() and self.peek() in " \t\r\n":
            self.advance(SPACE.match(self.text, self.at).end())

    def expect(self, mark: str) -> None:
        if self.peek() != mark:
            self.fail(f"expected '{mark}', found {repr(self.peek()) if self.peek() else 'the end of the file'}")
        self.advance(self.at + 1)

    def value(self) -> Any:
        """Parse one value. A failure near the end of what was read may only mean that more must be read."""
        size = CHUNK
        while True:
            try:
                value, end = self.parser.at(self.text, self.at)
                if end < len(self.text) or self.ended:
                    self.advance(end)
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or len(self.text[error.pos :].strip()) < 16
                if self.ended or not cut:
                    self.advance(error.pos)
                    self.fail(error.msg)
            except (
                ValueError,
                RecursionError,
            ) as error:  # a number of thousands of digits, a bottomless nest
                self.fail(str(error))
            self.grow(size)
            size *= 2  # so that a row of n characters is parsed about log n times, not n / CHUNK

    def fail(self, reason: str) -> NoReturn:
        raise UserError(
            f"{self.file}:{self.line}: broken JSON at column {self.column}: {reason};"
            " mend the array, or write one row a line (JSONL), where single broken rows can be dropped"
        )


def _not_utf8(file: str, line: int, error: UnicodeDecodeError) -> str:
    return f"{file}:{line}: {_undecodable(error)}"


def _undecodable(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x}: {error.reason}); save the file as UTF-8"
