"""Where batches are worked on: in this process, or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from align.recipe.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
Engine = Callable[[Callable[..., Any], tuple, Iterable[Any]], Iterator[Any]]
"""`engine(make, given, tasks)` yields `make(*given)(task)` for every task, in their order; `make` is called in each
process that works, and may be a class whose instances are called."""

AHEAD = 2  # tasks a worker that may wait

_worker: Callable[[Any], Any]


def local(workers: int) -> Engine:
    """An engine of so many processes on this machine; one is this process itself."""

    def run(make: Callable[..., Any], given: tuple, tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        first = list(islice(tasks, 2))
        if workers == 1 or len(first) < 2:  # nothing that a second process would take over
            work = make(*given)
            yield from (work(task) for task in chain(first, tasks))
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([make.__module__])
        pool = ProcessPoolExecutor(workers, context, _begin, (make, given))
        try:
            yield from _ordered(pool, first, tasks, workers * AHEAD)
        except BrokenProcessPool:
            raise UserError(
                "a worker was ended from outside, as the system does where memory is short: give fewer `workers`, and "
                "run the same command again to resume"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return run


def _ordered(pool: ProcessPoolExecutor, first: list[T], rest: Iterator[T], window: int) -> Iterator[R]:
    waiting: deque[Future] = deque()
    for task in chain(first, rest):
        waiting.append(pool.submit(_do, task))
        if len(waiting) > window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _begin(make: Callable[..., Callable[[Any], Any]], given: tuple) -> None:
    """A worker's beginning. It ends with the process that started it, however that ends; Ctrl-C, and the
    end of a terminal, are for that one."""
    global _worker
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # of rensa: the workers share out the cores
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _worker = make(*given)


def _end_with(parent: Any) -> None:
    """End where the process that started this one has ended: nobody else would tell, for the fork server lives as long
    as its workers do."""
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _do(task: Any) -> Any:
    return _worker(task)
