"""A checkpoint is whole or absent, whatever kills the process or fills the disk."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import forked
from test_checkpoint import names, parts, save, value_of

from align.recipe.errors import UserError
from align.training.runs.checkpoint import CheckpointWriter, newest_checkpoint, save_checkpoint
from align.training.runs.durable import write_atomic

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}  # audited by Python


def die_at(moment: int, folder: Path, keep: int) -> None:
    """Save steps 2, 2 and 3 after 1; kill -9 ourselves just before file operation number `moment`."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in OPERATIONS:
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    save(folder, 1, keep)
    sys.addaudithook(watch)
    for value in (2.0, 2.5, 3.0):
        save(folder, int(value), keep, value)
        write_atomic(folder / "saved", str(value))


def die_at_every_moment(folder: Path, keep: int) -> None:
    """Fork a process for each moment, until one lives to the end."""
    status = moment = -1
    while status != 0:
        moment += 1
        if (pid := os.fork()) == 0:
            die_at(moment + 1, folder / str(moment), keep)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)


@pytest.mark.parametrize("keep", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation(tmp_path, keep):
    """Every moment of a save, a replacement and a clean-up is tried; what was acknowledged is never lost."""
    child = forked(die_at_every_moment, tmp_path, keep)
    child.join()
    assert child.exitcode == 0
    seen = []
    for folder in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        saved = float((folder / "saved").read_text()) if (folder / "saved").exists() else 1.0
        path, passed_over = newest_checkpoint(folder)
        assert value_of(path) >= saved
        assert passed_over == []
        seen.append(value_of(path))
        save(folder, 4, keep)  # the next run cleans up
        assert len(list(folder.glob("step-*"))) == keep
        assert not list(folder.glob(".*-step-*"))
    assert seen == sorted(seen)
    assert set(seen) == {1.0, 2.0, 2.5, 3.0}


def save_without_end(folder: Path) -> None:
    for step in range(1, 10**6):
        save(folder, step)
        write_atomic(folder / "saved", str(step))


def test_killed_at_random_moments(tmp_path):
    for trial in range(8):
        folder = tmp_path / str(trial)
        child = forked(save_without_end, folder)
        while not (folder / "saved").exists():
            time.sleep(0.001)
        time.sleep(random.Random(trial).uniform(0, 0.1))
        child.kill()
        child.join()
        saved = int((folder / "saved").read_text())
        assert value_of(newest_checkpoint(folder)[0]) >= saved


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        first = save(disk / "checkpoints", 1)
        big = {"model": {"w": torch.ones(50_000)}}
        with pytest.raises(UserError, match=r"step-000002: cannot be written: No space left on device") as caught:
            save_checkpoint(disk / "checkpoints", 2, big, {}, keep=1)
        assert "(0.2 MB to write, 0.0 MB free in " in str(caught.value)
        assert names(first.parent) == ["step-000001"]
        assert value_of(newest_checkpoint(first.parent)[0]) == 1
        page = disk / "page.html"
        write_atomic(page, "old")
        with pytest.raises(UserError, match="No space left on device"):
            write_atomic(page, "x" * 100_000)
        assert page.read_text() == "old"
        assert names(disk) == ["checkpoints", "page.html"]
    finally:
        subprocess.run(["umount", disk], check=True)


def save_under_a_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    writer = CheckpointWriter(folder, keep=1)
    writer.begin()
    writer.save(2, {"model": {"w": torch.ones(50_000)}}, {})
    try:
        writer.wait()
    except UserError as error:
        (folder / "said").write_text(str(error))
    writer.begin()  # and goes on
    writer.save(3, parts(3.0), {"value": 3.0})
    assert writer.wait() > 0


def test_a_file_that_may_not_grow(tmp_path):
    save(tmp_path, 1)
    child = forked(save_under_a_limit, tmp_path)
    child.join()
    assert child.exitcode == 0
    assert "step-000002: cannot be written: File too large (0.2 MB to write, " in (tmp_path / "said").read_text()
    assert value_of(newest_checkpoint(tmp_path)[0]) == 3


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="step-000001: cannot be written: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)
