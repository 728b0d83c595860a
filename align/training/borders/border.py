"""The edge of every command: what ends it is one line, and an exit status that says of which kind."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch

from align.recipe.errors import UserError, printable

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
OURS = "this is a fault of align itself; please report it, with the lines above and the command"


class Parser(argparse.ArgumentParser):
    """A command line whose faults are a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more")


@contextmanager
def border(memory: str) -> Iterator[None]:
    """Around all that a command does; `memory`: the remedy where there was too little.

    Exit status 2: something that the user can mend; 130: interrupted; 1: a fault of align. Who reads the output may
    leave, which ends the command without a word. What the output's encoding lacks is written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a stream that is no file
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _end(2, *error.problems)
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except (torch.OutOfMemoryError, MemoryError):
        _end(2, f"out of memory: {memory}")
    except BrokenPipeError:
        _end(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        room = "; make room there, or use another folder" if error.errno in DISK_FAULTS else ""
        _end(2, f"{where}{error.strerror or error}{room}")
    except Exception:
        _end(1, traceback.format_exc().rstrip(), OURS)


def _end(status: int, *lines: str) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is sys.stderr and lines:
                print("\n".join(map(printable, lines)), file=stream)
            stream.flush()
        except (OSError, ValueError):  # nobody reads it, or its disk is full: Python would say so once more at its end
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(status) from None
