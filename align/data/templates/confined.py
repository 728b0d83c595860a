"""A chat template is a program of somebody else's. It gets seconds and memory for one conversation, and no more."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
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
    processor for this thread, so a slow machine changes nothing, nor does what other threads compute. The memory is the
    process's, so it is limited in the main thread alone, where nothing else is computed meanwhile.
    """
    main = threading.current_thread() is threading.main_thread()
    try:
        with _by_signal() if main else _by_a_watcher():
            yield
    except _TooLong:
        raise UserError(
            f"the chat template takes more than {SECONDS:g} seconds to write one conversation: mend it, or set "
            "model.chat_template to another"
        ) from None


@contextmanager
def _by_signal() -> Iterator[None]:
    """In the main thread, where Python runs handlers of signals."""
    began = time.thread_time()

    def over(_number: int, _frame: object) -> None:
        left = SECONDS - (time.thread_time() - began)
        if left <= 0:
            raise _TooLong
        signal.setitimer(signal.ITIMER_VIRTUAL, max(left, 0.001))  # the timer counts all threads

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with _memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _by_a_watcher() -> Iterator[None]:
    """In any other thread: one beside it raises the exception there."""
    thread, done, lock = threading.get_ident(), threading.Event(), threading.Lock()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + SECONDS

    def raised(kind: ctypes.py_object | None) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)

    def watch() -> None:
        while not done.wait(max(end - time.clock_gettime(clock), 0.001)):
            with lock:
                if not done.is_set() and time.clock_gettime(clock) >= end:
                    raised(ctypes.py_object(_TooLong))
                    break

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:
            done.set()
            raised(None)  # one that is still to come


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
