"""Work that the server's loop waits for without standing still.

Chat templates are the main thread's, where alone their memory has a limit: one that takes its three seconds holds up
the prompts after it, and nothing that is being answered. The tokens of long texts are made in another thread, and hold
up each other alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Tasks = SimpleQueue[tuple[Callable[[], Any], Future] | None]


class Desk:
    """Tasks, one after the other, in the thread that works here; long ones in one beside it."""

    def __init__(self) -> None:
        self.waiting = 0  # tasks that are not done
        self._tasks, self._long = Tasks(), Tasks()

    async def do(self, task: Callable[[], T], long: bool = False) -> T:
        """What the task gives, or raises. One that nobody waits for any more is left out."""
        future: Future[T] = Future()
        (self._long if long else self._tasks).put((task, future))
        self.waiting += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self.waiting -= 1

    def work(self) -> None:
        """Do what there is, until somebody asks to `close`. A signal's handler runs meanwhile."""
        threading.Thread(target=_work, args=(self._long,), name="long texts", daemon=True).start()
        _work(self._tasks)

    def close(self) -> None:
        """No more after what is there."""
        self._tasks.put(None)
        self._long.put(None)


def _work(tasks: Tasks) -> None:
    while (each := tasks.get()) is not None:
        done(*each)


def done(task: Callable[[], Any], future: Future) -> None:
    """Do a task that somebody waits for."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)
