"""Code of the user's own, called within a border: whatever it does becomes its result, or one line with its name."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from align.recipe.errors import UserError, reason
from align.training.borders.stops import STOPS, Stopped

T = TypeVar("T")


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


# What a whole process shares and a run relies on: how to read it, and how to put it back.
SHARED: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (_folder, os.chdir),
    (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
    (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    (lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, lambda _: signal.setitimer(signal.ITIMER_REAL, 0)),  # alarms
    *((partial(signal.getsignal, n), partial(signal.signal, n)) for n in (*STOPS, signal.SIGALRM)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda _: torch.set_default_device(None)),
    *((partial(torch.is_autocast_enabled, d), partial(torch.set_autocast_enabled, d)) for d in ("cpu", "cuda")),
    (torch.get_num_threads, torch.set_num_threads),
)


class Left(BaseException):
    """Foreign code asked to end the process at once."""


def foreign(name: str, function: Callable[[], T]) -> T:
    """What `function` returns. Raises UserError, `name` first, for whatever it raises instead, SystemExit and
    exceptions of its own making included. A signal passes through.

    The working folder, the standard streams, the signals' handlers and torch's settings are afterwards as they were.
    """
    before, process, leave = [read() for read, _ in SHARED], os.getpid(), os._exit

    def exit_(status: int) -> None:
        if os.getpid() != process:  # a process that it has started may end as it likes
            leave(status)
        raise Left(f"os._exit({status})")

    os._exit = exit_  # type: ignore[assignment]
    try:
        return function()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | Stopped):
            raise
        raise UserError(f"{name} ({reason(error)})") from error
    finally:
        os._exit = leave
        if os.getpid() != process:  # it has forked: the run is the other one
            leave(1)
        for value, (read, put) in zip(before, SHARED, strict=True):
            if read() != value:
                put(value)
