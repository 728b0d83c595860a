"""What is printed never ends a run, whatever stands at the other end."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from align.recipe.errors import UserError
from align.recipe.streams import Result, Safe, standard_streams

SAY = """
import sys
from rich.console import Console
from align.recipe.streams import standard_streams
with standard_streams():
    console = Console()
    for i in range(2000):
        print("Zürich ☃")
        console.print("Zürich ☃", markup=False)
    open(sys.argv[1], "w").write("saved")
"""


def test_a_closed_pipe_a_full_disk_and_an_ascii_terminal_are_borne(tmp_path):
    for number, (target, encoding) in enumerate((("pipe", "utf-8"), ("/dev/full", "utf-8"), ("pipe", "ascii"))):
        saved = tmp_path / str(number)
        process = subprocess.Popen(
            [sys.executable, "-c", SAY, str(saved)],
            stdout=subprocess.PIPE if target == "pipe" else os.open(target, os.O_WRONLY),
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        first = process.stdout.readline() if process.stdout else None
        if process.stdout:
            process.stdout.close()
        assert (process.wait(), process.stderr.read(), saved.read_text()) == (0, b"", "saved")
        process.stderr.close()
        assert first in (None, "Zürich ☃\n".encode() if encoding == "utf-8" else b"Z\\xfcrich \\u2603\n")


def test_text_that_can_be_shown_is_as_it_was():
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1", newline="")
    safe = Safe(stream)
    assert safe.write("ü") == 1
    safe.writelines(["☃", "\ud800"])
    safe.flush()
    assert stream.buffer.getvalue() == b"\xfc\\u2603\\ud800"
    assert (safe.encoding, safe.isatty()) == ("latin-1", False)
    stream.close()
    assert safe.write("gone") == 4
    before = sys.stdout
    with standard_streams():
        assert sys.stdout is not before
    assert sys.stdout is before


CLOSED = """
import os, sys
from align.recipe.streams import standard_streams
with standard_streams():
    file = open(sys.argv[1], "w")
    print("not for the file")
    os.write(1, b"nor this")
    os.write(2, b"nor this")
    file.write(f"{file.fileno()} {sys.stdin.read()!r}")
    child = os.posix_spawn("/bin/sh", ["sh", "-c", "echo told && echo told >&2"], {})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_leads_nowhere_and_its_number_is_no_files(closed, tmp_path):
    """A file would get it, and all that is printed; what is started has it too."""
    words = f'exec "{sys.executable}" -c "$1" "$2" {closed}'
    told = subprocess.run(
        ["sh", "-c", words, "sh", CLOSED, tmp_path / "file"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert told.returncode == 0, told.stderr
    number, said = (tmp_path / "file").read_text().split()
    assert int(number) > 2
    assert said == "''"


RESULT = """
import sys
from align.training.borders.border import border
with border("", result=True):
    for _ in range(int(sys.argv[1])):
        print("Zürich")
    if sys.argv[2:]:
        raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("3 left >/dev/full", "standard output: No space left on device; the result is not whole"),
        ("9000 >&-", "standard output is closed, and the result goes there"),
    ],
)
def test_a_result_that_stdout_does_not_take_is_missed(words, fault):
    words = f"""'{sys.executable}' -c "$1" {words}"""
    told = subprocess.run(["sh", "-c", words, "sh", RESULT], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert told.stderr.startswith(fault)


def test_a_reader_that_has_enough_of_a_result_is_no_fault():
    """It gets UTF-8, whatever the locale."""
    words = f"""{{ '{sys.executable}' -c "$1" 90000; echo $? >&2; }} | head -c 7"""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run(["sh", "-c", words, "sh", RESULT], capture_output=True, text=True, env=env)
    assert (told.stdout, told.stderr) == ("Zürich", "0\n")


def test_a_refused_result_is_refused_again():
    """A loop that tells its errors on stdout does not go on without it."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    stream = Result(Full(), closed=False)
    for _ in range(2):
        with pytest.raises(UserError, match="No space left on device"):
            stream.write("x")
