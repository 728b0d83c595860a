"""From a command line to a running stage: processes, threads, signals, and errors that speak."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from rich.console import Console
from transformers.utils import logging as transformers_logging

from align.recipe.errors import UserError, reason
from align.recipe.load import parse_command
from align.recipe.schema import BaseRecipe
from align.training import zero
from align.training.borders.border import border, shows
from align.training.borders.peers import Peers
from align.training.borders.processes import PATIENCE, FirstFailed, FirstRefused
from align.training.borders.stops import Signals, Stopped
from align.training.heap import keep_freed_memory
from align.training.session import Session
from align.training.shards import fsdp_asked

TOGETHER = 2.0  # seconds: of one Ctrl-C, a stage hears from the terminal and from its launcher
MENDED = (OSError, MemoryError, torch.OutOfMemoryError)  # what the user can mend, besides UserError
MEMORY = (
    "lower batch.row_tokens, or batch.cache_tokens where it samples, set model.gradient_checkpointing=true, or choose "
    "a smaller model"
)
TORCHRUN = "align.training.borders.torchrun"  # by name: its imports are of no use here
CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with it cuBLAS sums in the same order every time (its manual, 2.1.4)


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
    os.environ.setdefault(*CUBLAS)  # read when CUDA starts
    words = sys.argv[1:] if argv is None else argv
    with border(MEMORY, result=shows(words)), _among_processes() as peers:
        fsdp = fsdp_asked()
        if "train" in recipe_type.model_fields:  # else nothing trains, and each process holds the whole trunk
            words = [*words, *fsdp]
        command = parse_command(words, recipe_type, program)
        if argv is None:
            _join_processes(program, words)
        with Signals(TOGETHER) as signals, ExitStack() as held:
            accelerator = _processes(program)
            zero.settle(accelerator, command.recipe)
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
                peers.fault("stopped by a signal", 0)
            if torch.distributed.is_initialized():
                accelerator.end_training()


@contextmanager
def _among_processes() -> Iterator[Peers]:
    """This process among those of its run. What ends one ends all: the first says why, or whom it happened to."""
    peers = Peers()
    try:
        peers.join()
        yield peers
        peers.leave()
    except FirstRefused:
        peers.leave()
        if peers.elsewhere():
            raise
        raise SystemExit(2) from None
    except UserError as error:
        peers.fault("; ".join(error.problems), 2)
        if peers.rank:
            time.sleep(3)  # the first process says the same, and the launcher then ends the others
        raise
    except Stopped:
        peers.fault("stopped by a signal", 0)
        print("stopped by a signal", file=sys.stderr, flush=True)
        raise SystemExit(0) from None
    except FirstFailed:
        peers.leave()
        raise SystemExit(1) from None
    except SystemExit as end:
        peers.fault(f"exit status {end.code}", 2) if end.code else peers.leave()
        raise
    except Exception as error:
        peers.explain(error)
        scarce = "can't allocate memory" in str(error)
        peers.fault(reason(error), 2 if scarce or isinstance(error, MENDED) else 1)
        if scarce:
            raise MemoryError from error
        raise


def _processes(program: str) -> Accelerator:
    """This process among those of the run. Raises UserError where they do not find each other."""
    # Precision and accumulation are the recipe's own; a launcher's settings would change the numbers behind it.
    group = zero.ready() if zero.asked() else {}
    single, patient = GradientAccumulationPlugin(num_steps=1), InitProcessGroupKwargs(timeout=PATIENCE, **group)
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_plugin=single, kwargs_handlers=[patient])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # else each would be a run of its own, all in one folder
        raise UserError(
            f"{launched} processes were launched, but they do not find each other; on a CPU, launch them with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} -m {program} RECIPE"
        )
    return accelerator


def _join_processes(program: str, words: Sequence[str]) -> None:
    """On a CPU, accelerate's launcher starts one process, whatever number it is given, unless MPI is there.

    It then has set MASTER_ADDR, but no WORLD_SIZE. The processes asked for are started here instead, by torchrun.
    """
    environment = os.environ
    if "ACCELERATE_MIXED_PRECISION" not in environment or "WORLD_SIZE" in environment or torch.cuda.is_available():
        return
    if "MASTER_ADDR" not in environment:
        return
    asked = _asked([part for word in psutil.Process(os.getppid()).cmdline() for part in word.split("=", 1)])
    if asked["num_processes"] < 1:
        if "MASTER_PORT" not in environment or environment.get("ACCELERATE_USE_CPU") != "True":
            return  # a scheduler's MASTER_ADDR
        raise UserError(
            "accelerate's launcher was not told how many processes to start on a CPU: give it --num_processes N, "
            f"or run: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m {program} RECIPE"
        )
    options = {
        "nproc_per_node": asked["num_processes"] // asked["num_machines"],
        "nnodes": asked["num_machines"],
        "node_rank": asked["machine_rank"],
        "master_addr": environment["MASTER_ADDR"],
        "master_port": environment.get("MASTER_PORT", "29500"),
    }
    command = [sys.executable, "-m", TORCHRUN, *(f"--{name}={value}" for name, value in options.items())]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, "-m", program, *words], {**environment, "ACCELERATE_USE_CPU": "true"})


def _asked(launcher: list[str]) -> dict[str, int]:
    """What accelerate's launcher was told of processes: by flags, else in its configuration."""
    flags = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairwise(launcher)}
    asked = {"num_processes": 0, "num_machines": 1, "machine_rank": 0}
    file = flags.get("config_file")
    if file or ("--cpu" not in launcher and os.path.isfile(default_config_file)):
        config = load_config_from_file(file)
        asked |= {name: getattr(config, name) for name in asked if getattr(config, name, None) is not None}
    return asked | {name: int(flags[name]) for name in asked if flags.get(name, "").isdigit()}


def _use_all_cores() -> None:
    """accelerate's launcher gives a process one thread unless told otherwise; share the cores out instead."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("accelerate", "peft", "datasets", "torch.distributed", "httpx", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
