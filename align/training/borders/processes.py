"""What the processes of a run decide together.

A file or a cache is looked at by the first process alone. Processes that look at the disk each for itself may see
different things, and then wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from align.recipe.errors import UserError
from align.training.borders.stops import Stopped

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # how long a process waits for another: the first may tokenise a large set meanwhile


class FirstFailed(Exception):
    """The first process ended with an error that it tells itself."""


class FirstRefused(UserError):
    """What the first process tells the user; the others only end."""


def decided(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` gives in the first process, in all of them; nothing is called in the others.

    What it gives has to be small and picklable (it goes from process to process, never to the disk). Where it raises
    UserError or Stopped, all processes do.
    """
    if accelerator.num_processes == 1:
        return function()
    told: list = [None]
    try:
        if accelerator.is_main_process:
            told = [("given", function())]
    except UserError as error:
        told = [("refused", error.problems)]
    except Stopped:
        told = [("stopped", None)]
    except BaseException:
        broadcast_object_list([("failed", None)])
        raise
    ((kind, value),) = broadcast_object_list(told)
    if kind == "refused":
        raise UserError(*value) if accelerator.is_main_process else FirstRefused(*value)
    if kind == "stopped":
        raise Stopped
    if kind == "failed":
        raise FirstFailed
    return value


def first_then_others(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` in the first process, then in the others, which find what it left in a cache."""
    mine: list[T] = []
    decided(accelerator, lambda: mine.append(function()))
    return mine[0] if mine else function()


def gathered(function: Callable[[], T]) -> list[T]:
    """What `function` gives in each process, in all; where it raises Stopped or UserError in one, all raise it."""
    try:
        own: list = [("given", function())]
    except Stopped:
        own = [("stopped", None)]
    except UserError as error:
        own = [("refused", error.problems)]
    parts = gather_object(own)
    kinds = [kind for kind, _ in parts]
    if "stopped" in kinds:
        raise Stopped
    if "refused" in kinds:
        problems = dict.fromkeys(problem for kind, told in parts if kind == "refused" for problem in told)
        raise UserError(*problems) if PartialState().is_main_process else FirstRefused(*problems)
    return [value for _, value in parts]


def least(accelerator: Accelerator, number: int) -> int:
    """The smallest number of any process; all have to ask."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def any_asked(accelerator: Accelerator, asked: bool) -> bool:
    """Whether this is so in any process; all have to ask."""
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum") > 0)
