"""A stage as processes: started, watched through its log, asked to stop, and found again after a kill of the pipeline.

All processes of a stage write to one log file, so whoever has it for stdout belongs to the stage.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from align.recipe.records import is_there
from align.tools.pipeline.stage import TOOLS, Stage

PROGRESS = re.compile(r"step (\d+)(?:/| of )(\d+)|: (\d+) of (\d+)\b")
TAIL = 2**14  # bytes
FORKS = multiprocessing.get_context("forkserver")


class Launcher:
    """How stages are started, and how many at once: by `accelerate launch`, or as forks of what has all imported."""

    def __init__(self, accelerate: dict[str, Any] | None, jobs: int | Literal["auto"], devices: Sequence[str]) -> None:
        """`accelerate`: the recipe's section; `devices`: GPUs as CUDA_VISIBLE_DEVICES names them."""
        self.accelerate, self.devices = accelerate, devices
        self.per_job = accelerate["processes"] or len(devices) or 1 if accelerate else 1
        self.room = jobs if jobs != "auto" else max(1, len(devices) // self.per_job)

    def command(self, stage: Stage, recipe: Path, fresh: bool, slot: int = 0) -> list[str]:
        """What a user would type to start a stage."""
        words = ["-m", f"align.{stage.kind}", str(recipe), *(["--fresh"] if fresh else [])]
        if stage.kind in TOOLS or self.accelerate is None:
            return ["python", *words]
        config, processes = self.accelerate["config"], self.accelerate["processes"]
        options = ["-q", *(["--config_file", config] if config else [])]
        options += ["--num_processes", str(processes)] if processes else []
        options += ["--main_process_port", str(29500 + slot)] if slot else []  # where its processes meet
        return ["accelerate", "launch", *options, *words]

    def environment(self, slot: int) -> dict[str, str]:
        """Of the several jobs at once, this one's share of the machine."""
        if self.room == 1:
            return {}
        if self.devices:
            first = slot * self.per_job
            mine = [self.devices[i % len(self.devices)] for i in range(first, first + self.per_job)]
            return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.room))}


class Job:
    """A stage that is running."""

    def __init__(self, stage: Stage, command: Sequence[str], log: Path, env: dict[str, str], slot: int) -> None:
        self.stage, self.log, self.slot, self.begun = stage, log, slot, time.monotonic()
        self.asked: set[int] = set()  # processes that were asked to stop
        log.parent.mkdir(parents=True, exist_ok=True)
        is_there(log)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
        self.offset = log.stat().st_size
        self.status = (_launched if command[0] == "accelerate" else _forked)(command, log, {**os.environ, **env})

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.begun

    def over(self) -> int | None:
        """The exit status, once no process of it is left."""
        status = self.status()
        return status if status == 0 or (status is not None and not holders(self.log)) else None

    def stop(self) -> None:
        """Ask its processes to save and end. To be called until it is over, for a launcher may yet start some."""
        ask_to_stop(self.log, self.asked)

    def told(self) -> str:
        """The end of what it has written since its start."""
        with self.log.open("rb") as file:
            file.seek(max(self.offset, self.log.stat().st_size - TAIL))
            return file.read().decode("utf-8", "replace")

    def progress(self) -> tuple[int, int] | None:
        """Done, of how many."""
        found = PROGRESS.findall(self.told())
        return (int(found[-1][0] or found[-1][2]), int(found[-1][1] or found[-1][3])) if found else None


Status = Callable[[], int | None]


def _launched(command: Sequence[str], log: Path, env: dict[str, str]) -> Status:
    """In a session of its own, so that a terminal's Ctrl-C reaches the pipeline alone."""
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    with log.open("ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(words, env={**env, "PYTHONUNBUFFERED": "1"}, start_new_session=True, **streams).poll


def _forked(command: Sequence[str], log: Path, env: dict[str, str]) -> Status:
    """What `python -m align.…` would do, without its seconds of imports."""
    own = psutil.Process()
    process = FORKS.Process(target=_child, args=(command[2], command[3:], str(log), env, own.pid, own.create_time()))
    process.start()
    return lambda: process.exitcode


def _child(module: str, argv: list[str], log: str, env: dict[str, str], pipeline: int, born: float) -> None:
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    if not _lives(pipeline, born):  # who comes after a pipeline that was killed may have looked before this had the log
        return
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(env)
    if env.get("OMP_NUM_THREADS", "").isdecimal():  # was read when torch was imported
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    importlib.import_module(module).main(argv)


def _lives(pid: int, born: float) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    return False


def devices() -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def holders(log: Path) -> list[psutil.Process]:
    """The processes whose stdout is this file."""
    path, found = str(log.resolve()), []
    for process in psutil.process_iter():
        try:
            if any(file.fd == 1 and file.path == path for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue  # gone, or another user's
    return found


def ask_to_stop(log: Path, asked: set[int]) -> bool:
    """SIGTERM, once, to a stage's own processes, which save and end, their launchers after them; False if none is."""
    found = holders(log)
    for process in found:
        with suppress(psutil.Error):
            words = process.cmdline()
            module = words[words.index("-m") + 1] if "-m" in words else ""
            own = module.startswith("align.") or any("multiprocessing.forkserver" in word for word in words)
            if own and process.pid not in asked:
                asked.add(process.pid)
                process.terminate()
    return bool(found)
