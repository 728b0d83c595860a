"""Processes that tests begin end with them, however a test ends."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
from forks import ending, ends_with_its_test, forked
from world import WAIT, alive

STARTS_ONE = "import subprocess, time; subprocess.Popen(['sleep', '600']); print(flush=True); time.sleep(600)"


def gone(*pids: int) -> bool:
    deadline = time.monotonic() + WAIT
    while alive(*pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(*pids)


def test_what_a_failing_test_has_begun_ends_with_it(request):
    assert "_ending" in request.fixturenames  # around every test
    kept = forked(time.sleep, 600, kept=True)
    pids = []
    with pytest.raises(AssertionError), ending():  # noqa: PT012
        pids.append(forked(time.sleep, 600).pid)
        process = subprocess.Popen([sys.executable, "-c", STARTS_ONE], stdout=subprocess.PIPE)
        process.stdout.readline()
        pids += [process.pid, *(one.pid for one in psutil.Process(process.pid).children())]
        ends_with_its_test(process.pid)
        raise AssertionError
    assert len(pids) == 3
    assert gone(*pids)
    assert alive(kept.pid)
    kept.kill()
