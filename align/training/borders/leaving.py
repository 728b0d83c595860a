"""Ways to end a process at once, past every `finally`: `os._exit` and `os.exec…`.

Code of the user's own may take them where it is called, and later too, from a thread or at the interpreter's end. A
command then must not end with status 0 and without its result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import _exit, execv, execve, getpid, write
from threading import get_ident
from typing import Any, ClassVar

STATUS = 2  # of a command that was ended so before it was done


class Left(BaseException):
    """Foreign code asked to end the process at once."""


class _Command:
    """The command that this process runs."""

    process = 0
    ended: int | None = None  # its exit status, once it has one
    threads: ClassVar[set[int]] = set()  # where foreign code is called: what it asks for there becomes an exception


def heard() -> None:
    """From now on this thread does not end the process, and others do not without the command's knowing."""
    os._exit, os.execv, os.execve = _leave, _replaced(execv), _replaced(execve)  # type: ignore[assignment]
    _Command.process = getpid()
    _Command.threads.add(get_ident())


def unheard(before: bool) -> None:
    """Foreign code has returned to this thread; `before`: it is still called from it."""
    if not before:
        _Command.threads.discard(get_ident())


def called_here() -> bool:
    """Whether this thread runs foreign code."""
    return get_ident() in _Command.threads


@contextmanager
def command() -> Iterator[None]:
    """Around a command: whatever ends the process afterwards does so with its exit status."""
    _Command.ended = None
    try:
        yield
        _Command.ended = 0
    except SystemExit as end:
        _Command.ended = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        os._exit, os.execv, os.execve = _exit, execv, execve


def _leave(status: int) -> None:
    if getpid() != _Command.process:  # a process that it has started may end as it likes
        _exit(status)
    if called_here():
        raise Left(f"os._exit({status})")
    if _Command.ended is None:
        told = (
            f"code of your own ended the process with os._exit({status}) before there was a result: mend it, and run "
            "the same command again to go on\n"
        )
        with suppress(OSError):
            write(2, told.encode())
        _exit(status or STATUS)
    _exit(status or _Command.ended)


def _replaced(function: Callable[..., Any]) -> Callable[..., Any]:
    def instead(path: Any, *arguments: Any) -> Any:
        if getpid() == _Command.process:
            raise Left(f"os.{function.__name__}({path!r})")
        return function(path, *arguments)

    return instead
