"""The running batch in a thread of its own: requests come from any thread, and hear what they said as it is said."""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from align.models.checkpoints.adapters import token_without_row
from align.models.sampling.adapters import BARE
from align.models.sampling.choice import Sampling
from align.models.sampling.requests import Request, Said
from align.models.sampling.running import Event, Running
from align.recipe.errors import UserError
from align.tools.serving.desk import done
from align.tools.serving.models import Loaded, Served, Shelf

T = TypeVar("T")
Heard = Callable[[Said], object]
OVER = "the server has stopped"


class Full(Exception):
    """As many requests wait as may."""


class Gone(Exception):
    """The adapter that a request was to have has been taken away since."""


class Asked(Request):
    """A request that somebody listens to."""

    def __init__(self, heard: Heard, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.heard, self.came = heard, time.monotonic()
        self.first: float | None = None  # when it heard its first token
        self.last = self.came  # and its last one

    def hear(self, said: Said) -> None:
        """Something was said."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.heard(said)


class Stream:
    """What a model says to one request, token by token, as it is said."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self.request: Asked | None = None

    def __iter__(self) -> Iterator[Said]:
        """Until the one with an `end`. Left early, the request leaves the batch. Raises UserError after a fault."""
        try:
            while True:
                said = self.said.get()
                if said.end == "fault":
                    raise UserError(said.fault)
                yield said
                if said.end:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody listens any more."""
        self.request.cancelled = True


class Engine:
    """The models that are served, and the batch of all their requests."""

    def __init__(self, shelf: Shelf | None, running: Running, most_waiting: int = 1024) -> None:
        """`shelf`: None where no model answers."""
        self.shelf, self.running, self.most_waiting = shelf, running, most_waiting
        self.models: dict[str, Served] = {}
        self.deliver: Callable[[Sequence[Event]], None] = tell
        self.faults = self.steps = 0
        self._threads = torch.get_num_threads()
        self._news = threading.Condition()
        self._requests: deque[Asked] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future]] = deque()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- from any thread ----------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """The thread."""
        self._thread.start()
        return self

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after the step that runs; what is not done then hears that it is over."""
        with self._news:
            self._over = True
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        if not self._thread.is_alive():
            self.running.close()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._over

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._requests) + len(self._tasks) + len(self.running.waiting)

    @property
    def busy(self) -> int:
        """Requests that have."""
        return len(self.running.filling) + len(self.running.going)

    def submit(
        self, model: str, ids: np.ndarray, sampling: Sampling, key: tuple[int, ...], top: int | None = None
    ) -> Stream:
        """Ask a model by name to go on from token ids (l,). `key` fixes the draws; `top`: how many likeliest tokens
        are told beside each, None: no log-probabilities either. Raises UserError for what cannot be answered."""
        if model not in self.models:
            raise UserError(f"there is no model {model!r}; there are {', '.join(self.models)}")
        served, stream = self.models[model], Stream()
        if fault := self.fault_of(ids, sampling.max_new):
            raise UserError(fault)
        stream.request = Asked(stream.said.put, served.voice, np.asarray(ids, np.int32), sampling, key, top)
        self.ask([stream.request])
        return stream

    def fault_of(self, ids: np.ndarray, more: int) -> str | None:
        """Why a prompt, (l,), cannot be gone on from for so many more tokens; None where it can."""
        if not len(ids):
            return "the prompt has no token to go on from"
        if len(ids) + more > self.running.room:
            return (
                f"this model's maximum context length is {self.running.room} tokens, and the prompt has {len(ids)}"
                + (f" and {more} more are asked for" if more else "")
            )
        if int(min(ids)) < 0:
            return "the prompt has a token below 0"
        fault = token_without_row(self.shelf.trunk.tokenizer, [int(max(ids))], self.shelf.trunk.rows)
        return fault and f"the prompt {fault}"

    def ask(self, requests: Sequence[Asked]) -> None:
        """Requests that are sound, all or none. Raises Full, and Gone."""
        with self._news:
            if self._over:
                raise UserError(OVER)
            if not all(self.running.has(request.voice.adapter) for request in requests):
                raise Gone
            if self.waiting and self.waiting + len(requests) > self.most_waiting:
                raise Full
            self._requests.extend(requests)
            self._news.notify()

    def do(self, task: Callable[[], T]) -> Future[T]:
        """Something between two steps."""
        future: Future[T] = Future()
        with self._news:
            if self._over:
                future.set_exception(UserError(OVER))
            self._tasks.append((task, future))
            self._news.notify()
        return future

    def put(self, loaded: Loaded) -> Future[Served]:
        """A result that was read, on the trunk, in place of one of its name, whose rows go on to their end."""
        return self.do(lambda: self._put(loaded))

    def remove(self, name: str) -> Future[None]:
        """The same away from it."""
        return self.do(lambda: self._remove(name))

    # -- in the thread -------------------------------------------------------------------------------------------

    def _put(self, loaded: Loaded) -> Served:
        number = self.running.adapters.add(loaded.chain)
        try:
            served = self.shelf.served(loaded, number)
        except BaseException:
            self.running.retire(number)
            raise
        before = self.models.get(loaded.name)
        self.models = {**self.models, loaded.name: served}  # others may be reading the one before
        if before:
            self._retire(before)
        return served

    def _remove(self, name: str) -> None:
        before = self.models[name]
        self.models = {other: served for other, served in self.models.items() if other != name}
        self._retire(before)

    def _retire(self, served: Served) -> None:
        if served.voice.adapter != BARE:  # one on a trunk of its own is under no number
            with self._news:  # what was asked of it until now is its own; what comes later is Gone
                self._join()
                self.running.retire(served.voice.adapter)

    def _join(self) -> None:
        """Into the batch: counted as waiting in one place or the other."""
        while self._requests:
            self.running.join(self._requests[0])
            self._requests.popleft()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # of this thread, too
        while True:
            with self._news:
                while not (self._requests or self._tasks or self._over) and self.running.idle:
                    self._news.wait()
                if self._over:
                    break
                tasks = [*self._tasks]
                self._tasks.clear()
                self._join()
            for task, future in tasks:
                done(task, future)
            try:
                events = self.running.step()
            except Exception as error:
                events = self._failed(error)
            self.steps += 1
            self.deliver(events)
        left = [*self._requests, *self.running.clear()]
        for _, future in self._tasks:
            future.cancel()
        self.deliver([(request, Said(end="fault", fault=OVER)) for request in left])

    def _failed(self, error: Exception) -> list[Event]:
        """A step that did not end: the requests in it hear so, and the next ones begin with a clean batch."""
        self.faults += 1
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error)
        if not memory:
            print(traceback.format_exc().rstrip(), file=sys.stderr)
        told = (
            "out of memory: ask for less at once, or start the server with fewer tokens" if memory else "internal error"
        )
        return [(request, Said(end="fault", fault=told)) for request in self.running.clear()]


def tell(events: Sequence[Event]) -> None:
    """Every request what it said."""
    for request, said in events:
        request.hear(said)
