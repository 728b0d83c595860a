"""stdin, stdout and stderr that a command can rely on, whatever stands at the other end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from align.recipe.errors import UserError

NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}  # of the process's open files


class ReaderLeft(Exception):
    """Nobody reads the result any more. No OSError: libraries that print end the process at a broken pipe."""


class Safe:
    """A text stream whose writes never fail. Where its reader has gone, or its disk is full, it falls silent."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False
        self.fault: OSError | None = None  # why something is lost that somebody may still want to read

    def write(self, text: str) -> int:
        """Characters that the stream's encoding lacks are written as escapes."""
        self._try(self._written, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Each as `write`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As far as there is somebody to read it."""
        self._try(self.stream.flush)

    def _written(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _try(self, function: Callable[..., object], *words: str) -> None:
        try:
            if not self.gone:
                function(*words)
        except (OSError, ValueError) as error:  # no reader, no room, or a stream that was closed
            self._silence()
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.fault = error

    def _silence(self) -> None:
        """What is left in its buffer, and what others write there, goes nowhere: Python flushes it at its end."""
        self.gone = True
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Result(Safe):
    """stdout where a command's result goes there. Raises UserError where it cannot be written, and ReaderLeft where
    there is no reader any more. A file or a pipe gets UTF-8, whatever the locale."""

    def __init__(self, stream: TextIO, closed: bool) -> None:
        super().__init__(stream)
        told = "standard output is closed, and the result goes there: open it, or send it to a file"
        self.refusal: Exception | None = UserError(told) if closed else None
        with suppress(AttributeError, ValueError, OSError):  # a stream that is no file
            if not stream.isatty():
                stream.reconfigure(encoding="utf-8")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        """As of `Safe`, but for what it raises."""
        if self.refusal:
            raise self.refusal
        return super().write(text)

    def _lost(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        told = f"standard output: {reason}; the result is not whole: make room there, or send it elsewhere"
        self.refusal = ReaderLeft() if isinstance(error, BrokenPipeError) else UserError(told)
        raise self.refusal


@contextmanager
def standard_streams(result: bool = False) -> Iterator[None]:
    """Within this there are three streams, and stdout and stderr are `Safe`; with `result`, stdout is a `Result`.

    A stream that the caller has closed leads nowhere. It may not stay closed: the next file to be opened would get its
    number, and whatever a library prints would be written into that file.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    closed = sys.stdout is None
    for name, number in NUMBERS.items():
        _open_file(number)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
    sys.stdout = Result(sys.stdout, closed) if result else Safe(sys.stdout)  # type: ignore[assignment]
    sys.stderr = Safe(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(UserError, ReaderLeft):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _open_file(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        os.set_inheritable(number, True)  # the processes that it starts have the same
