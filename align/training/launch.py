"""From a command line to a running stage: processes, threads, signals, and errors that speak."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from rich.console import Console
from transformers.utils import logging as transformers_logging

from align.recipe.errors import UserError
from align.recipe.load import parse_command
from align.recipe.schema import BaseRecipe
from align.training.session import Session

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def run_stage(
    recipe_type: type[BaseRecipe],
    program: str,
    stage: Callable[[Session], None],
    argv: Sequence[str] | None = None,
) -> None:
    """Run a stage's `main`. What a user can mend is printed line by line, with exit status 2 and no traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|accelerate")
    accelerator = None
    try:
        command = parse_command(sys.argv[1:] if argv is None else argv, recipe_type, program)
        if argv is None:
            _join_processes(program)
        # Precision and accumulation are the recipe's own; a launcher's settings would change the numbers behind it.
        single = GradientAccumulationPlugin(num_steps=1)
        accelerator = Accelerator(mixed_precision="no", gradient_accumulation_plugin=single)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:  # else each would be a run of its own, all in one folder
            raise UserError(
                f"{launched} processes were launched, but they do not find each other; on a CPU, launch them with "
                f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} -m {program} RECIPE"
            )
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise UserError("accelerate's DeepSpeed and FSDP plugins are not supported yet: use DDP (--multi_gpu)")
        _quiet_libraries()
        _use_all_cores()
        keep_freed_memory()
        console = Console(quiet=not accelerator.is_main_process)
        stage(Session(command.recipe, accelerator, console, command.fresh, command.show))
    except (KeyboardInterrupt, torch.OutOfMemoryError, MemoryError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        remedy = "lower batch.row_tokens, or set model.gradient_checkpointing=true"
        print("interrupted" if stopped else f"out of memory on the device; {remedy}", file=sys.stderr, flush=True)
        raise SystemExit(130 if stopped else 2) from None
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # the first process says the same, and the launcher then ends the others
        print("\n".join(error.problems), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror}; make room there, or use another folder", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            print("out of memory: lower batch.row_tokens, or choose a smaller model", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        if accelerator is None or accelerator.is_main_process or "by peer" not in str(error):
            raise
        raise SystemExit(2) from None  # the first process has ended, and has said why
    finally:
        if accelerator is not None and torch.distributed.is_initialized() and sys.exc_info()[0] is None:
            accelerator.end_training()


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted here instead of ending the process; a second one ends it."""
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join_processes(program: str) -> None:
    """On a CPU, accelerate's launcher starts one process, whatever number it is given, unless MPI is there.

    It then has set MASTER_ADDR, but no WORLD_SIZE. The processes asked for are started here instead, by torchrun.
    """
    environment = os.environ
    if "ACCELERATE_MIXED_PRECISION" not in environment or "WORLD_SIZE" in environment or torch.cuda.is_available():
        return
    if "MASTER_ADDR" not in environment:
        return
    asked = {"num_processes": 0, "num_machines": 1, "machine_rank": 0}
    words = [part for word in psutil.Process(os.getppid()).cmdline() for part in word.split("=", 1)]
    for flag, value in pairwise(words):
        name = flag.removeprefix("--").replace("-", "_")
        if name in asked and value.isdigit():
            asked[name] = int(value)
    if asked["num_processes"] < 1:
        if "MASTER_PORT" not in environment or environment.get("ACCELERATE_USE_CPU") != "True":
            return  # a scheduler's MASTER_ADDR
        raise UserError(
            "accelerate's launcher starts several processes on a CPU only if it is given --num_processes N; "
            f"or run: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m {program} RECIPE"
        )
    options = {
        "nproc_per_node": asked["num_processes"] // asked["num_machines"],
        "nnodes": asked["num_machines"],
        "node_rank": asked["machine_rank"],
        "master_addr": environment["MASTER_ADDR"],
        "master_port": environment.get("MASTER_PORT", "29500"),
    }
    command = [sys.executable, "-m", "torch.distributed.run", *(f"--{name}={value}" for name, value in options.items())]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, "-m", program, *sys.argv[1:]], {**environment, "ACCELERATE_USE_CPU": "true"})


def _use_all_cores() -> None:
    """accelerate's launcher gives a process one thread unless told otherwise; share the cores out instead."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """A step needs again what the last one freed. glibc would give it back to the system, and every page would be made
    anew, which takes some 4 % of a step on a CPU."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        with suppress(AttributeError):  # another C library
            tune = ctypes.CDLL(None).mallopt
            if tune(M_MMAP_THRESHOLD, 2**30) or tune(M_MMAP_THRESHOLD, 2**25):  # the most that older ones take
                tune(M_TRIM_THRESHOLD, 2**31 - 1)


def _quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("accelerate", "peft", "datasets", "torch.distributed", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
