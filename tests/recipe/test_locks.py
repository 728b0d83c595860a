"""One process at a time: in a folder at once or not at all, behind a lock file one after another."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from align.recipe.errors import UserError
from align.recipe.locks import alone, claimed

FORK = multiprocessing.get_context("fork")


def counted(file: Path, lock: Path, times: int) -> None:
    """Add 1 to the number in a file, again and again, as it must not be done without a lock."""
    for _ in range(times):
        with alone(lock):
            number = int(file.read_text())
            os.sched_yield()
            file.write_text(str(number + 1))


def test_a_folder_is_held_once_and_leaves_nothing_where_nothing_was_written(tmp_path):
    folder = tmp_path / "a" / "b"
    with claimed(folder):
        busy = f"another process is writing to {folder}; wait for it, or stop it"
        with pytest.raises(UserError, match=busy), claimed(folder):
            pass
        assert folder.is_dir()
    assert [*tmp_path.iterdir()] == []
    with claimed(folder):
        (folder / "kept").touch()
    with claimed(folder):
        pass
    assert (folder / "kept").exists()


@pytest.mark.parametrize("name", ["file", "file/below", "dangling", "nul\0", "x" * 300])
def test_what_can_be_no_folder_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("a")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError) as error, claimed(tmp_path / name):
        pass
    assert str(error.value).startswith("run: ")
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "a"


def claim(folder: Path, won: Path) -> None:
    try:
        with claimed(folder):
            with won.open("a") as file:
                file.write("in ")
            time.sleep(0.002)
            with won.open("a") as file:
                file.write("out ")
    except UserError:
        pass


def test_of_many_at_once_never_two_are_inside_though_the_folder_comes_and_goes(tmp_path):
    for number in range(5):
        won = tmp_path / f"won{number}"
        started = [FORK.Process(target=claim, args=(tmp_path / f"run{number}", won)) for _ in range(4)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        words = won.read_text().split()
        assert words == ["in", "out"] * (len(words) // 2)
        assert not (tmp_path / f"run{number}").exists()


def test_behind_a_lock_file_they_come_one_after_another(tmp_path):
    file, lock = tmp_path / "number", tmp_path / ".lock"
    file.write_text("0")
    started = [FORK.Process(target=counted, args=(file, lock, 50)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert file.read_text() == "200"
    assert not lock.exists()
