"""Processes forked off one that has imported the stages already: a server of such forks for all tests of a process.

They have no threads of the tests' own process, whose locks a fork of it would hold for ever.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "distill", "evaluate", "compare", "pipeline")
PRELOADED = [f"align.{stage}" for stage in STAGES]
BEGUN: list[psutil.Process] = []  # by the tests that run now


def ends_with_its_test(pid: int) -> None:
    """However that test ends."""
    with suppress(psutil.NoSuchProcess):
        BEGUN.append(psutil.Process(pid))


@contextmanager
def ending() -> Iterator[None]:
    """What is begun within ends here, with all that it has begun itself."""
    before = len(BEGUN)
    try:
        yield
    finally:
        begun = BEGUN[before:]
        del BEGUN[before:]
        for process in begun:
            with suppress(psutil.Error):
                for one in (*process.children(recursive=True), process):
                    with suppress(psutil.Error):
                        one.kill()


def begun_server() -> dict[str, Any]:
    """The server of this process, which begins; what another process needs to use it."""
    multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
    multiprocessing.forkserver.ensure_running()
    server = multiprocessing.forkserver._forkserver
    return {
        name: getattr(server, name) for name in ("_forkserver_address", "_forkserver_authkey") if hasattr(server, name)
    }


def use_server(found: dict[str, Any]) -> None:
    """In another process: what it forks comes from that server, which ends with the process that has begun it."""
    vars(multiprocessing.forkserver._forkserver).update(found, _forkserver_alive_fd=os.pipe()[1])
    share_server()


def forked(target: Callable[..., Any], *args: Any, kept: bool = False) -> BaseProcess:
    """A process that has begun to call `target`. It ends with its test, unless it is `kept` for several tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # each time: the server begins with the first fork, and keeps what it has
    process = context.Process(target=target, args=args)
    process.start()
    if not kept:
        ends_with_its_test(process.pid)
    return process


def share_server() -> None:
    """In such a process: what it forks comes from the same server, not from one of its own that imports all again."""
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # its address is known from the fork
