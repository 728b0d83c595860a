"""A command for two processes: several runs one after another, with the bytes that each holds after its first step."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from test_processes import free_port
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def main(argv: list[str]) -> None:
    """A folder that both processes see, then words that are JSON: a stage, and the stage's words, with environment
    variables among them."""
    folder, *runs = argv
    for number, word in enumerate(runs):
        if deepspeed := sys.modules.get("deepspeed.comm.comm"):
            deepspeed.cdb = None  # it keeps the processes of the run before
        stage, *words = json.loads(word)
        os.environ["MASTER_PORT"] = agreed_port(Path(folder) / f"port{number}")
        os.environ.update(word.split("=") for word in words if word.startswith("ACCELERATE_"))
        AcceleratorState._reset_state(reset_partial_state=True)
        held = []
        counting = register_optimizer_step_post_hook(lambda *_, held=held: held or held.append(live_bytes()))
        try:
            given = [word for word in words if not word.startswith("ACCELERATE_")]
            importlib.import_module(f"align.{stage}").main(given)
        finally:
            counting.remove()
        print(json.dumps({"held": held[0] if held else 0}), flush=True)
        gc.collect()


def agreed_port(file: Path) -> str:
    """One that is free now, found by the first process."""
    if os.environ["RANK"] == "0":
        beside = file.with_suffix(".writing")
        beside.write_text(str(free_port()))
        beside.rename(file)
    while not file.is_file():
        time.sleep(0.01)
    return file.read_text()


def live_bytes() -> int:
    """Of all tensors that this process holds, each storage once; of a sharded one, its part here."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        for tensor in (thing, thing.grad) if isinstance(thing, torch.Tensor) and thing.is_leaf else (thing,):
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(local, torch.Tensor) and (local.device.type, local.layout) == ("cpu", torch.strided):
                storage = local.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())
