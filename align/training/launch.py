"""From a command line to a running stage: processes, threads, signals, and errors that speak."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from rich.console import Console
from transformers.utils import logging as transformers_logging

from align.recipe.errors import UserError
from align.recipe.load import parse_command
from align.recipe.schema import BaseRecipe
from align.recipe.streams import safe_streams
from align.training.borders.border import border
from align.training.borders.processes import PATIENCE, FirstFailed, FirstRefused
from align.training.borders.stops import Signals, Stopped
from align.training.session import Session
from align.training.shards import fsdp_asked

TOGETHER = 2.0  # seconds: of one Ctrl-C, a stage hears from the terminal and from its launcher
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MEMORY = "lower batch.row_tokens, set model.gradient_checkpointing=true, or choose a smaller model"


def run_stage(
    recipe_type: type[BaseRecipe],
    program: str,
    stage: Callable[[Session], None],
    argv: Sequence[str] | None = None,
) -> None:
    """Run a stage's `main`. What a user can mend is printed line by line, with exit status 2 and no traceback; what is
    left is a fault of ours, with exit status 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|accelerate")
    with safe_streams(), border(MEMORY), _among_processes():
        words, fsdp = sys.argv[1:] if argv is None else argv, fsdp_asked()
        if "train" in recipe_type.model_fields:  # else nothing trains, and each process holds the whole trunk
            words = [*words, *fsdp]
        command = parse_command(words, recipe_type, program)
        if argv is None:
            _join_processes(program)
        with Signals(TOGETHER) as signals, ExitStack() as held:
            accelerator = _processes(program)
            _quiet_libraries()
            _use_all_cores()
            keep_freed_memory()
            console = Console(quiet=not accelerator.is_main_process)
            flags = {"fresh": command.fresh, "show": command.show, "extend": command.extend}
            session = Session(command.recipe, accelerator, console, **flags, signals=signals, held=held)
            try:
                stage(session)
            except Stopped:
                session.say("stopped by a signal; run the same command again to go on")
            if torch.distributed.is_initialized():
                accelerator.end_training()


@contextmanager
def _among_processes() -> Iterator[None]:
    """What ends one process of several: the first says why, and the others say nothing."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except UserError as error:
        if not first:
            time.sleep(3)  # the first process says the same, and the launcher then ends the others
        if isinstance(error, FirstRefused):
            raise SystemExit(2) from None
        raise
    except Stopped:
        print("stopped by a signal", file=sys.stderr, flush=True)
        raise SystemExit(0) from None
    except FirstFailed:
        raise SystemExit(1) from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise MemoryError from error
        if not first and "by peer" in str(error):
            raise SystemExit(2) from None  # the first process has ended, and has said why
        raise


def _processes(program: str) -> Accelerator:
    """This process among those of the run. Raises UserError where they do not find each other."""
    # Precision and accumulation are the recipe's own; a launcher's settings would change the numbers behind it.
    single, patient = GradientAccumulationPlugin(num_steps=1), InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_plugin=single, kwargs_handlers=[patient])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # else each would be a run of its own, all in one folder
        raise UserError(
            f"{launched} processes were launched, but they do not find each other; on a CPU, launch them with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} -m {program} RECIPE"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("accelerate's DeepSpeed plugin is not supported yet: use DDP (--multi_gpu)")
    return accelerator


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
