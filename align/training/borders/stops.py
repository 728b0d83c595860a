"""Signals that ask a command to stop: it does so where it is, or, where that would lose something, at the next point
where nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last where a terminal closes


class Stopped(BaseException):
    """A signal asked this command to stop. No `Exception`: code that catches all of these lets it pass."""


class Signals:
    """SIGTERM, SIGINT and SIGHUP while this is entered, but for a SIGHUP that `nohup` ignores. The first raises Stopped
    where it arrives, or, within `deferred`, is only noted; a later one ends the process at once.

    Python runs handlers in the main thread, between two of its instructions: to be entered there.
    """

    def __init__(self, together: float = 0.0) -> None:
        """`together`: seconds within which signals count as one."""
        self.asked, self.together = list[int](), together  # the signals that came
        self._first, self._deferred = 0.0, False

    def __enter__(self) -> Signals:
        heard = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[list[int]]:
        """Within this, what runs looks by itself whether anything was `asked`."""
        before, self._deferred = self._deferred, True
        try:
            yield self.asked
        finally:
            self._deferred = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this a signal raises Stopped where it arrives, even inside `deferred`; one that came before, too."""
        before, self._deferred = self._deferred, False
        try:
            self.heed()
            yield
        finally:
            self._deferred = before
        self.heed()

    def heed(self, *_news: object) -> None:
        """Raise Stopped if a signal came."""
        if self.asked:
            raise Stopped

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first < self.together:
            return
        if self.asked:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.asked.append(number)
        self._first = now
        if not self._deferred:
            raise Stopped


@contextmanager
def signals() -> Iterator[list[int]]:
    """These signals are noted here instead of ending the process; a later one ends it."""
    with Signals() as found, found.deferred() as asked:
        yield asked
