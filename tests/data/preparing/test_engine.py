"""The engine of several processes: order, faults, and a worker that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from align.data.preparing.engine import local
from align.recipe.errors import UserError


class Squares:
    """Work that takes longer for some tasks than for others."""

    def __init__(self, told: str) -> None:
        self.told = told

    def __call__(self, task: int) -> tuple[int, int]:
        if task == -1:
            raise UserError(f"{self.told}: first", "second")
        if task == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01 * (task % 3))
        return task * task, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_their_tasks(workers):
    found = list(local(workers)(Squares, ("here",), iter(range(12))))
    assert [square for square, _ in found] == [i * i for i in range(12)]
    assert len({process for _, process in found}) <= workers
    with pytest.raises(UserError) as error:
        list(local(workers)(Squares, ("here",), [1, 2, -1, 3]))
    assert error.value.problems == ("here: first", "second")


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_as_they_are_needed(workers):
    taken = 0

    def tasks():
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield taken

    results = local(workers)(Squares, ("",), tasks())
    assert next(results)[0] == 1
    assert taken < 10
    results.close()


def test_one_task_needs_no_other_process():
    assert list(local(4)(Squares, ("",), [3])) == [(9, os.getpid())]
    assert list(local(4)(Squares, ("",), [])) == []


def test_workers_end_with_the_process_that_started_them(tmp_path):
    told = tmp_path / "workers"
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from data.preparing.test_engine import Squares\n"
        "from align.data.preparing.engine import local\n"
        "found = local(2)(Squares, ('',), iter(range(10**9)))\n"
        "pids = {next(found)[1] for _ in range(20)}\n"
        "open(sys.argv[1], 'w').write(' '.join(map(str, pids)) + '\\n')\n"
        "for _ in found: pass\n"
    )
    paths = [str(Path(__file__).parents[level]) for level in (2, 3)]
    process = subprocess.Popen([sys.executable, "-c", program, str(told), *paths])
    deadline = time.monotonic() + 120
    while not (told.exists() and told.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    workers = list(map(int, told.read_text().split()))
    process.kill()
    process.wait()
    while any(psutil.pid_exists(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="give fewer `workers`"):
        list(local(2)(Squares, ("",), [1, -2, 3, 4]))
