"""From a command line to a running stage: the recipe, the processes, the screen, and errors that speak."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from align.data.mixture import Prepared, counting, prepare
from align.data.render import LossOn, show
from align.models.demo import cache_folder
from align.recipe.errors import UserError
from align.recipe.load import parse_command
from align.recipe.schema import BaseRecipe

SHOWN = 3  # examples that --show prints
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Session:
    """What every stage starts from."""

    recipe: BaseRecipe
    accelerator: Accelerator
    console: Console  # silent on all processes but the first
    fresh: bool
    show: bool

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.accelerator.is_main_process

    def prepare(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Prepared:
        """The run's data; the first process tokenises, the others then find it in the cache."""
        recipe = self.recipe
        with self.accelerator.main_process_first(), counting(self.console) as progress:
            data = prepare(recipe.data, tokenizer, loss_on, recipe.seed, cache_folder(), progress)
        for line in data.summary:
            self.say(line)
        return data

    def say(self, line: str) -> None:
        """Print a line, as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show_examples(self, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
        """What `--show` prints: the first examples of the first epoch, their trained tokens marked."""
        for i in data.train.order(self.recipe.seed, 0)[:SHOWN]:
            tree = data.train.tree(int(i))
            self.say(f"\n{data.train.where(int(i))} ({tree.packed_length} tokens, {tree.label_count} trained)")
            self.console.print(show(tree, tokenizer, colour=self.console.is_terminal), soft_wrap=True)


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
        # Precision is the recipe's own; a launcher's mixed-precision setting would change the numbers behind it.
        accelerator = Accelerator(mixed_precision="no")
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise UserError("accelerate's DeepSpeed plugin is not supported: use DDP or FSDP2 (`accelerate config`)")
        _quiet_libraries()
        _use_all_cores()
        console = Console(quiet=not accelerator.is_main_process)
        stage(Session(command.recipe, accelerator, console, command.fresh, command.show))
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        remedy = "lower batch.row_tokens, or set model.gradient_checkpointing=true"
        print("interrupted" if stopped else f"out of memory on the device; {remedy}", file=sys.stderr, flush=True)
        raise SystemExit(130 if stopped else 2) from None
    except UserError as error:
        if accelerator is not None and not accelerator.is_main_process:
            time.sleep(3)  # the first process says the same, and takes the others down
        print("\n".join(error.problems), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror}; make room there, or choose another folder", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
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
    for name in ("accelerate", "peft", "datasets", "torch.distributed", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
