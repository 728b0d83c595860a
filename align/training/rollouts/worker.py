"""A process in which a reward function is called, and the guard that ends it; pool.py starts and asks them.

The process forks before it imports anything of the user's. The parent of the two, the guard, runs no code but this:
when the run is gone, however it went, or the child has ended, it ends the whole group, with all that the function has
started in it.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, NoReturn

from align.recipe.errors import reason
from align.training.rollouts.given import numbers


def main(fd: int) -> NoReturn:
    """Serve the connection `fd`: a function's name comes first, then calls (prompts, responses, rows), pickled by the
    run; what goes back is JSON: `ready`, `unusable`, `numbers`, `failed`, or `ended` with the exit status."""
    connection = Connection(fd)
    if child := os.fork():
        _guard(connection, child)
    try:
        _serve(connection)
    finally:
        os._exit(0)


def _guard(connection: Connection, child: int) -> NoReturn:
    def reap() -> None:
        _, status = os.waitpid(child, 0)
        try:
            _tell(connection, ended=os.waitstatus_to_exitcode(status))
        finally:
            os.killpg(0, signal.SIGKILL)

    Thread(target=reap).start()
    gone = select.poll()
    gone.register(connection.fileno(), 0)  # that the other side has closed is told without being asked for
    while not gone.poll():
        pass
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("it is one of the group")


def _serve(connection: Connection) -> None:
    try:
        function = named(connection.recv())
    except BaseException as error:
        _tell(connection, unusable=reason(error))
        return
    _tell(connection, ready=True)
    with asyncio.Runner() as runner:
        while True:
            try:
                call = connection.recv()
            except EOFError:
                return
            _tell(connection, **_answer(function, call, runner))


def _answer(function: Callable[..., Any], call: tuple[list, list, list], runner: asyncio.Runner) -> dict[str, Any]:
    async def awaited() -> list[float | None]:
        return numbers(await function(*call), len(call[1]))

    try:
        scores = runner.run(awaited()) if is_async(function) else numbers(function(*call), len(call[1]))
    except BaseException as error:
        return {"failed": reason(error)}
    finally:
        with suppress(Exception):  # it has closed it
            sys.stdout.flush()
    return {"numbers": scores}


def _tell(connection: Connection, **said: Any) -> None:
    connection.send_bytes(json.dumps(said).encode())


def named(name: str) -> Callable[..., Any]:
    """`package.module:function`, imported."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives something to be awaited."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
