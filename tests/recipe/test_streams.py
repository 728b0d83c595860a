"""What is printed never ends a run, whatever stands at the other end."""

from __future__ import annotations

import io
import os
import subprocess
import sys

from align.recipe.streams import Safe, safe_streams

SAY = """
import sys
from rich.console import Console
from align.recipe.streams import safe_streams
with safe_streams():
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
    with safe_streams():
        assert sys.stdout is not before
    assert sys.stdout is before
