"""stdout and stderr that never end a run: what cannot be shown there is left out, or spelt in ASCII."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Safe:
    """A text stream whose writes never fail. Where its reader has gone, or its disk is full, it falls silent."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.gone = stream, False

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
        except (OSError, ValueError):  # no reader, no room, or a stream that was closed
            self._silence()

    def _silence(self) -> None:
        """What is left in its buffer, and what others write there, goes nowhere: Python flushes it at its end."""
        self.gone = True
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """stdout and stderr are `Safe` within this."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Safe(stream) if stream is not None else None for stream in before)  # type: ignore
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Safe):
                stream.flush()
        sys.stdout, sys.stderr = before
