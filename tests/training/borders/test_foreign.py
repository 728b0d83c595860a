"""What code of the user's own may do to the process that calls it, and what a command makes of it."""

from __future__ import annotations

import atexit
import builtins
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import ANY

import pytest

from align.recipe.errors import UserError
from align.training.borders.border import border
from align.training.borders.foreign import foreign


def spoil() -> None:
    """Sets what a run calls by name to nothing, and forgets all modules."""
    del sys.stdout
    sys.modules.clear()
    for place in (os, os.path, shutil, time, pathlib.Path, pathlib.PurePath):
        for name in [name for name in vars(place) if not name.startswith("__")]:
            setattr(place, name, None)
    vars(builtins).update(dict.fromkeys(name for name in vars(builtins) if not name.startswith("__")))


def fail_and_spoil() -> None:
    spoil()
    raise KeyError  # which is None by now


def shown() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError

        __ne__ = __eq__
        __hash__ = None

    sys.stdout = Odd()
    os.rename = Odd()


def equal_to_all() -> None:
    os.rename = ANY


def load_again() -> None:
    for name in ("os", "shutil"):
        del sys.modules[name]
        assert __import__(name) is not globals()[name]


@pytest.mark.parametrize("function", [spoil, fail_and_spoil, shown, equal_to_all, load_again])
def test_names_are_as_they_were(function, tmp_path):
    before = [os.rename, shutil.rmtree, open, sys.stdout, time.sleep, pathlib.Path.write_text, len, sys.modules["os"]]
    loaded = {*sys.modules}
    fails = pytest.raises(UserError, match=r"^it failed \(TypeError: exceptions must derive from BaseException\)$")
    with fails if function is fail_and_spoil else nullcontext():
        foreign("it failed", function)
    after = [os.rename, shutil.rmtree, open, sys.stdout, time.sleep, pathlib.Path.write_text, len, sys.modules["os"]]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert loaded <= {*sys.modules}
    (tmp_path / "a").write_text("a")


def test_what_a_function_brings_stays():
    def brings() -> None:
        os.brought = 1
        sys.modules["brought"] = sys

    foreign("it failed", brings)
    assert (os.brought, sys.modules.pop("brought")) == (1, sys)
    del os.brought


def ended(code: Callable[[], object], capfd: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and last line of a command that calls this, in a process of its own."""
    if not (child := os.fork()):
        status = 1
        try:
            with border("too little memory"):
                code()
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            atexit._run_exitfuncs()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, capfd.readouterr().err.strip()


def later(status: int) -> Callable[[], None]:
    """A function whose thread ends the process a moment after it has returned."""

    def leave() -> None:
        time.sleep(0.05)
        os._exit(status)

    return lambda: threading.Thread(target=leave).start()


@pytest.mark.parametrize(("asked", "status"), [(0, 2), (3, 3)])
def test_a_thread_that_ends_the_process_later(asked, status, capfd):
    """Never with status 0: there is no result."""

    def run() -> None:
        foreign("it failed", later(asked))
        time.sleep(20)

    told = (
        f"code of your own ended the process with os._exit({asked}) before there was a result: mend it, and run the "
        "same command again to go on"
    )
    assert ended(run, capfd) == (status, told)


@pytest.mark.parametrize("code", ["os._exit(0)", "os.execv('/bin/true', ['true'])", "os.execlp('true', 'true')"])
def test_no_call_ends_the_process(code, capfd):
    status, told = ended(lambda: foreign("it failed", lambda: exec(code)), capfd)
    assert status == 2
    assert told.startswith("it failed (Left: os."), told


def test_a_thread_that_becomes_another_program(capfd):
    def other() -> None:
        thread = threading.Thread(target=lambda: os.execv("/bin/true", ["true"]))
        thread.start()
        thread.join()

    def run() -> None:
        foreign("it failed", other)
        raise UserError("it goes on")

    status, told = ended(run, capfd)
    assert (status, told.splitlines()[-1]) == (2, "it goes on")


@pytest.mark.parametrize(("fault", "status"), [(None, 0), ("no", 2)])
def test_what_it_does_at_the_end_keeps_the_status(fault, status, capfd):
    def run() -> None:
        foreign("it failed", lambda: atexit.register(os._exit, 0))
        if fault:
            raise UserError(fault)

    assert ended(run, capfd) == (status, fault or "")


def test_a_process_that_it_starts_ends_as_it_likes():
    def forks() -> int:
        if not (child := os.fork()):
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert foreign("it failed", forks) == 7
