"""A command that the tests start in two processes: what they decide together."""

from __future__ import annotations

import os
import time

import torch

from align.recipe.errors import UserError
from align.training.borders import peers
from align.training.borders.border import border
from align.training.borders.processes import any_asked, decided, first_then_others
from align.training.borders.stops import Stopped
from align.training.launch import MEMORY, _among_processes, _processes


def main(argv: list[str]) -> None:
    rank, how = int(os.environ["RANK"]), argv[0]
    if how == "comes late":
        peers.JOINING = 1.0
        time.sleep(4 * rank)
    with border(MEMORY), _among_processes():
        accelerator = _processes("deciding")
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        calls = []

        def look():
            calls.append(rank)
            if how == "refuses":
                raise UserError("it is not there")
            if how == "stops":
                raise Stopped
            if how == "fails":
                raise KeyError("a fault")
            return f"seen by {rank}"

        if how == "dies" and rank == 1:
            os._exit(9)
        if how == "fails alone" and rank == 1:
            raise UserError("its disk is not there")
        print(decided(accelerator, look), calls, flush=True)
        print(first_then_others(accelerator, look), calls, flush=True)
        print(any_asked(accelerator, rank == 1), any_asked(accelerator, False), flush=True)
        print(group.options._timeout.days, "days", flush=True)
        accelerator.end_training()
