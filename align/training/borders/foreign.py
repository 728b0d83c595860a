"""Code of the user's own, called within a border: whatever it does becomes its result, or one line with its name."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from os import _exit, getpid
from typing import Any, TypeVar

import torch

from align.recipe.errors import UserError, reason
from align.training.borders import leaving
from align.training.borders.names import names, put_back
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


def foreign(name: str, function: Callable[[], T]) -> T:
    """What `function` returns. Raises UserError, `name` first, for whatever it raises instead, SystemExit and
    exceptions of its own making included. A signal passes through.

    The working folder, the standard streams, the signals' handlers, torch's settings, and what the names of
    `names.MODULES` stand for, are afterwards as they were.
    """
    before, process, within = [read() for read, _ in SHARED], getpid(), leaving.called_here()
    leaving.heard()
    try:
        return _by_name(function)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | Stopped):
            raise
        raise UserError(f"{name} ({reason(error)})") from error
    finally:
        if getpid() != process:  # it has forked: the run is the other one
            _exit(1)
        leaving.unheard(within)
        for value, (read, put) in zip(before, SHARED, strict=True):
            now = read()
            if now is not value and not (type(now) is type(value) and now == value):
                put(value)


def _by_name(function: Callable[[], T]) -> T:
    known = names()
    try:
        return function()
    finally:
        put_back(known)  # first of all: even to name an exception takes them
