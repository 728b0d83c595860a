"""The edge of every command: what ends it is one line, and an exit status that says of which kind."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from align.recipe.errors import UserError, printable
from align.recipe.streams import ReaderLeft, standard_streams
from align.training.borders import leaving

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
SHOWING = ("--help", "-h", "--schema", "--show", "--dry-run")  # what is asked for then goes to stdout
OURS = "this is a fault of align itself; please report it, with the lines above and the command"


class Parser(argparse.ArgumentParser):
    """A command line whose faults are a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more")


def shows(argv: Sequence[str]) -> bool:
    """Whether a command line asks for something that goes to stdout."""
    return not {*SHOWING}.isdisjoint(argv)


@contextmanager
def border(memory: str, result: bool = False) -> Iterator[None]:
    """Around all that a command does; `memory`: the remedy where there was too little; `result`: whether what it is
    asked for goes to stdout, and not to files.

    Exit status 2: something that the user can mend; 130: interrupted; 1: a fault of align. Who reads the output may
    leave: that ends a command whose result goes there, without a word, and no other.
    """
    with leaving.command(), standard_streams(result):
        try:
            with _flushed():
                yield
        except UserError as error:
            _end(2, *error.problems)
        except KeyboardInterrupt:
            _end(130, "interrupted")
        except _of_memory():
            _end(2, f"out of memory: {memory}")
        except ReaderLeft:
            _end(0)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            room = "; make room there, or use another folder" if error.errno in DISK_FAULTS else ""
            _end(2, f"{where}{error.strerror or error}{room}")
        except Exception:
            _end(1, traceback.format_exc().rstrip(), OURS)
        if fault := getattr(sys.stdout, "fault", None):
            print(f"standard output: {fault.strerror}; not all that was to be told is there", file=sys.stderr)


@contextmanager
def _flushed() -> Iterator[None]:
    """What is written to stdout has gone there where this ends, unless it ends with an error."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _of_memory() -> tuple[type[BaseException], ...]:
    """What says that memory is short; PyTorch's own where the command uses it, which takes seconds to import."""
    torch = sys.modules.get("torch")
    return (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)


def _end(status: int, *lines: str) -> NoReturn:
    if lines:
        print("\n".join(map(printable, lines)), file=sys.stderr)
    raise SystemExit(status) from None
