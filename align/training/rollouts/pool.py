"""Processes of its own for a reward function: one response a call, as many calls at once as there are processes.

A call that takes too long is killed with its process and all that this has started, and so are all of them when the
run ends, even by SIGKILL (worker.py).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from heapq import heapify, heappop, heappush
from multiprocessing.connection import Pipe, wait
from subprocess import DEVNULL, Popen
from typing import Any

from align.recipe.errors import UserError
from align.training.rollouts.given import Verdict, late, pause, verdicts

Call = tuple[str, str, dict[str, Any]]  # prompt, response, row
START = "import sys; sys.path[:] = {path!r}; from align.training.rollouts.worker import main; main({fd})"


class Worker:
    """One process, and what it is busy with."""

    def __init__(self, function: str) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            start = START.format(path=[place for place in sys.path if isinstance(place, str)], fd=theirs.fileno())
            self.process = Popen(
                [sys.executable, "-c", start],
                stdin=DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group of its own, which a terminal's Ctrl-C does not reach
                env={"OMP_NUM_THREADS": "1"} | os.environ,
            )
        self.connection.send(function)
        self.ready = False
        self.call: tuple[int, int] | None = None  # its number, and how often it was tried before
        self.until = math.inf

    def ask(self, number: int, attempt: int, call: Call, timeout: float) -> None:
        """Begin a call. Its time runs from when the function is imported."""
        self.call, self.until = (number, attempt), time.monotonic() + timeout if self.ready else math.inf
        prompt, response, row = call
        with suppress(OSError):  # it is gone, as its connection will tell
            self.connection.send(([prompt], [response], [row]))

    def said(self) -> dict[str, Any]:
        """What it sent."""
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):  # it is gone, or the function wrote here
            return {"ended": None}

    def end(self) -> None:
        """Kill the process and all that it has started in its group."""
        self.connection.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Pool:
    """The processes of one function; they start when they are first needed."""

    def __init__(self, function: str, count: int, timeout: float | None, retries: int) -> None:
        self.function, self.count, self.timeout, self.retries = function, count, timeout or math.inf, retries
        self.workers: list[Worker] = []
        weakref.finalize(self, _end_all, self.workers)

    def __call__(self, calls: Sequence[Call]) -> list[Verdict]:
        """What is said of each response. Raises UserError where a process cannot import the function; where anything is
        raised, all processes are ended."""
        found: list[Verdict | None] = [None] * len(calls)
        waiting = [(0.0, number, 0) for number in range(len(calls))]  # not before when, which, tried how often before
        heapify(waiting)
        try:
            while waiting or self._busy():
                while waiting and waiting[0][0] <= time.monotonic() and (worker := self._idle()):
                    _, number, attempt = heappop(waiting)
                    worker.ask(number, attempt, calls[number], self.timeout)
                for number, attempt, verdict in self._heard(calls, waiting[0][0] if waiting else math.inf):
                    if isinstance(verdict, str) and attempt < self.retries:
                        heappush(waiting, (time.monotonic() + pause(attempt + 1), number, attempt + 1))
                    else:
                        found[number] = verdict
        except BaseException:
            _end_all(self.workers)
            raise
        return found

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.call]

    def _idle(self) -> Worker | None:
        for worker in [worker for worker in self.workers if not worker.call]:
            if not worker.connection.poll():
                return worker
            self._lose(worker)  # what speaks without being asked has ended
        if len(self.workers) == self.count:
            return None
        self.workers.append(Worker(self.function))
        return self.workers[-1]

    def _lose(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.end()

    def _heard(self, calls: Sequence[Call], until: float) -> list[tuple[int, int, Verdict]]:
        """Wait, until some time at most, for what processes say, and what they are too late to say: number, tries
        before, and verdict of calls."""
        busy, heard = self._busy(), []
        if len(busy) == self.count:
            until = math.inf  # nobody is free for what waits
        left = min([until, *(worker.until for worker in busy)]) - time.monotonic()
        spoken = wait([worker.connection for worker in busy], None if left == math.inf else max(left, 0.0))
        for worker in busy:
            said = worker.said() if worker.connection in spoken else {}
            if "ready" in said:
                worker.ready, worker.until = True, time.monotonic() + self.timeout
            elif said or worker.until <= time.monotonic():
                (number, attempt), worker.call, worker.until = worker.call, None, math.inf
                heard.append((number, attempt, self._verdict(worker, said, calls[number][1])))
        return heard

    def _verdict(self, worker: Worker, said: dict[str, Any], response: str) -> Verdict:
        match said:
            case {"numbers": list(scores)}:
                return verdicts(scores, [response])[0]
            case {"failed": str(why)}:
                return f"failed ({why})"
        self._lose(worker)
        if not said:
            return late(self.timeout)
        why = said.get("unusable") or f"the process ended{_with(said.get('ended'))}"
        if not worker.ready:
            raise UserError(f"the reward function {self.function} cannot be imported in a process of its own ({why})")
        return f"failed ({why})"


def _with(status: int | None) -> str:
    if status is None:
        return ""
    return f" with exit status {status}" if status >= 0 else f" by {signal.Signals(-status).name}"


def _end_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().end()
