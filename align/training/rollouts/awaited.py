"""Reward functions that are `async`: all of a batch's calls are awaited together."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from align.recipe.errors import reason
from align.training.borders import leaving
from align.training.rollouts.given import Verdict, late, numbers, pause, verdicts

BLOCKED = 5.0  # seconds that the loop may need besides the calls


class Await(NamedTuple):
    """A call with all responses of a batch."""

    begin: Callable[[], Awaitable[Any]]
    responses: Sequence[str]
    timeout: float | None
    retries: int


def together(calls: Sequence[Await]) -> list[list[Verdict]]:
    """What each call says of its responses. A signal is raised here at once, and cancels them.

    Raises RuntimeError where every call is long late, but one keeps the loop from ending them.
    """

    async def all_of_them() -> list[list[Verdict]]:
        return await asyncio.gather(*map(_tried, calls))

    found = asyncio.run_coroutine_threadsafe(all_of_them(), _loop())
    try:
        return found.result(min(max(map(_longest, calls)) + BLOCKED, threading.TIMEOUT_MAX))
    except TimeoutError:
        raise RuntimeError("one blocks where it should await, so no `timeout` can end it; set `processes`") from None
    finally:
        found.cancel()


def _longest(call: Await) -> float:
    """Seconds after which its last try is late."""
    timeout = math.inf if call.timeout is None else call.timeout
    return (call.retries + 1) * timeout + sum(map(pause, range(1, call.retries + 1)))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls, so that a client that a function keeps stays usable; in a thread of its own, since a signal
    that arrives in one of a loop's callbacks is only logged there."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        leaving.heard()  # for good: a task may be left behind
        asyncio.set_event_loop(loop)
        while True:
            with suppress(BaseException):  # a task that a function has left behind calls sys.exit
                loop.run_forever()

    threading.Thread(target=run, name="reward functions", daemon=True).start()
    return loop


async def _tried(call: Await) -> list[Verdict]:
    for attempt in range(call.retries + 1):
        await asyncio.sleep(pause(attempt) if attempt else 0)
        task = asyncio.ensure_future(_said(call))
        try:
            await asyncio.wait({task}, timeout=call.timeout)
        finally:
            task.cancel()  # where it has not ended; and it is not waited for, as it may not want to
        if isinstance(said := task.result() if task.done() else late(call.timeout), list):
            return verdicts(said, call.responses)
    return [said] * len(call.responses)


async def _said(call: Await) -> list[float | None] | str:
    process = os.getpid()
    try:
        return numbers(await call.begin(), len(call.responses))
    except BaseException as error:
        return f"failed ({reason(error)})"
    finally:
        if os.getpid() != process:  # it has forked: the run is the other one
            os._exit(1)
