"""A chat template is a program of somebody else's. It gets seconds and memory for one conversation, and no more."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from align.recipe.errors import UserError

SECONDS = 3.0  # of the processor, for one conversation; the templates of common models take about 0.0002
MEMORY = 2**31  # bytes


class _TooLong(BaseException):  # which Jinja does not catch
    """The time is over."""


@contextmanager
def confined() -> Iterator[None]:
    """Around one rendering. Raises UserError where it takes more than `SECONDS`, and MemoryError beyond `MEMORY`.

    Jinja's sandbox keeps a template from Python's objects, but lets it loop and grow. The time is that of the
    processor, so a slow or a sleeping machine changes nothing; it is measured in a process's main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        before = signal.signal(signal.SIGVTALRM, _over)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            with _memory():
                yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    except _TooLong:
        raise UserError(
            f"the chat template takes more than {SECONDS:g} seconds to write one conversation: mend it, or set "
            "model.chat_template to another"
        ) from None


def _over(_number: int, _frame: object) -> None:
    raise _TooLong


@contextmanager
def _memory() -> Iterator[None]:
    """On Linux, where the system holds a process to such a limit."""
    if sys.platform != "linux":
        yield
        return
    file = os.open("/proc/self/statm", os.O_RDONLY)
    pages = int(os.read(file, 64).split()[0])
    os.close(file)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + MEMORY
    tighter = soft == resource.RLIM_INFINITY or wanted < soft
    resource.setrlimit(resource.RLIMIT_AS, (wanted if tighter else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
