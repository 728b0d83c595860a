"""Work for the process's main thread: chat templates, whose time has a limit there alone, and the tokens of long texts.

The server's loop waits for it without standing still, so a template that takes its three seconds holds up the prompts
after it, and nothing that is being answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Desk:
    """Tasks, one after the other, in the thread that does them."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future] | None] = SimpleQueue()

    async def do(self, task: Callable[[], T]) -> T:
        """What the task gives, or raises. One that nobody waits for any more is left out."""
        future: Future[T] = Future()
        self._tasks.put((task, future))
        return await asyncio.wrap_future(future)

    def work(self) -> None:
        """Do what there is, until somebody asks to `close`. A signal's handler runs meanwhile."""
        while (each := self._tasks.get()) is not None:
            done(*each)

    def close(self) -> None:
        """No more after what is there."""
        self._tasks.put(None)


def done(task: Callable[[], Any], future: Future) -> None:
    """Do a task that somebody waits for."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)
