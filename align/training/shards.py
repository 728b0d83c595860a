"""A trunk whose weights lie over the processes: `train.shard: layers`.

Each process keeps a part of every weight of the base. Before a layer computes, forward or backward, its weights are
gathered from all processes, and let go of after it (Zhao et al. 2023, arXiv 2304.11277; torch's `fully_shard`). What a
LoRA trains, and heads on a frozen trunk, are small: they stay whole on every process, and their gradients are averaged
in one all-reduce a step; AdamW's moments are shared out (`shard_learner.py`). With `lora: null` gradients and moments
lie over the processes as the weights do.

A gathering is a collective: all processes must run the layers equally often, or hold the weights whole meanwhile
(`Trunk.whole`), as they do while they sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from align.models.base import load_base
from align.models.trunk import Trunk, Whole
from align.recipe.errors import UserError
from align.recipe.schema import Lora, Model
from align.training import zero
from align.training.heap import give_back, map_large_pieces
from align.training.session import Session

FSDP = "ACCELERATE_USE_FSDP"
OVERRIDE = "train.shard=layers"


def fsdp_asked() -> list[str]:
    """The override of the recipe that a launcher's FSDP configuration stands for; none without one.

    What is set of it in the environment goes: accelerate would wrap the model itself, on a GPU alone, and transformers
    would load weights in the first process only. Raises UserError for what `train.shard` cannot do.
    """
    if not zero.is_true(FSDP, os.environ.pop(FSDP, "false")):
        return []
    if zero.is_true("FSDP_OFFLOAD_PARAMS", os.environ.get("FSDP_OFFLOAD_PARAMS", "false")):
        raise UserError(
            "accelerate's fsdp_offload_params: weights cannot be kept in the host's memory; set it to false, and "
            "lower batch.row_tokens or set model.gradient_checkpointing=true where memory is short"
        )
    return [OVERRIDE]


def load_trunk(session: Session, outputs: int | None = None) -> Trunk:
    """The recipe's base with its adapter, and a head of `outputs` if any, on this process's device, whole or as a shard
    of it."""
    recipe = session.recipe
    session.usage.begin()
    if recipe.train.shard == "layers" and session.accelerator.num_processes == 1:
        session.say("train.shard: layers has nothing to do: there is one process")
    return held(session, recipe.model, recipe.lora, frozen=recipe.lora is not None, outputs=outputs)


def held(session: Session, model: Model, lora: Lora | None, *, frozen: bool, outputs: int | None = None) -> Trunk:
    """A model as the run holds its trunk: that one, or another beside it, such as a teacher."""
    recipe, accelerator = session.recipe, session.accelerator
    device, sharded = accelerator.device, recipe.train.shard == "layers" and accelerator.num_processes > 1
    loaded_on = torch.device("cpu") if sharded else device
    if sharded:
        map_large_pieces()
    base = load_base(model, device, frozen=frozen, seed=recipe.seed, outputs=outputs, loaded_on=loaded_on)
    how = partial(shard, device=device, processes=accelerator.num_processes) if sharded else None
    if zero.stage_of(accelerator) == 3:
        how = zero.layers_together
    trunk = Trunk(base, model, lora, recipe.seed, outputs, how)
    if sharded:
        let_go(trunk)  # the trials have left its root whole, and who asks for its parameters now means the shards
        session.say(told(trunk))
    give_back()
    return trunk


def shard(trunk: Trunk, device: torch.device, processes: int) -> Whole:
    """Keep a part of each of the base's weights here, on the device; what makes them whole for a while."""
    small = {p for p in trunk.parameters() if p.requires_grad and trunk.adapted}
    mesh = init_device_mesh(device.type, (processes,))
    for part in (*trunk.layers, trunk):
        fully_shard(part, mesh=mesh, ignored_params=small)
    for p in small:
        p.data = p.data.to(device)
    for method in ("states", "hidden"):  # they compute too, beside `forward`
        register_fsdp_forward_method(trunk, method)
    trunk._get_fsdp_state()._lazy_init()  # else what is called first, such as a layer, takes itself for the root
    return partial(whole, trunk)


@contextmanager
def whole(trunk: Trunk, part: nn.Module | None = None) -> Iterator[None]:
    """All weights of a part (a layer, or the trunk but for its layers), or all there are, in one piece for a while.

    Every process has to come by; within, none waits for another.
    """
    parts = [m for m in trunk.modules() if isinstance(m, FSDPModule) and part in (None, m)]
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in parts:
            m.reshard()
            m.set_reshard_after_forward(m is not trunk, recurse=False)  # torch's own choice: a root is needed again
        _forget_passes(trunk)
        give_back()


def _forget_passes(trunk: Trunk) -> None:
    """What was called while the weights were whole, more often here than in another process: a backward pass would
    gather ahead what came before its own forward pass, in this process alone, and wait for the others forever."""
    states = [m._get_fsdp_state() for m in trunk.modules() if isinstance(m, FSDPModule)]
    for state in states:
        state._comm_ctx.post_forward_order.clear()
        for group in state._fsdp_param_groups:
            group._post_forward_indices.clear()


def let_go(trunk: Trunk) -> None:
    """Of embeddings, last norm and head, where they are sharded: a pass leaves them whole for the next, which may not
    come. All parameters are shards again."""
    if isinstance(trunk, FSDPModule):
        trunk.reshard()


def told(trunk: Trunk) -> str:
    """What is sharded, in one line."""
    shards = [p for p in trunk.parameters() if isinstance(p, DTensor)]
    own, of_all = (sum(p.numel() * p.element_size() for p in ps) for ps in ([p.to_local() for p in shards], shards))
    return (
        f"sharded: {own / 2**20:,.1f} of {of_all / 2**20:,.1f} MiB of weights lie on this process; a layer's are "
        "gathered while it computes"
    )


def agreed(module: nn.Module) -> nn.Module:
    """The module; what of it trains whole on every process is now as it is in the first."""
    trained = [p.data for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    together(trained, lambda flat: distributed.broadcast(flat, 0))
    return module


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over all processes of gradients of what trains whole on each; those of shards have been averaged."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]

    def mean(flat: torch.Tensor) -> None:
        distributed.all_reduce(flat)
        flat /= accelerator.num_processes

    together(gradients, mean)


def together(tensors: list[torch.Tensor], act: Callable[[torch.Tensor], None]) -> None:
    """`act` in place on float32 tensors, all in one (n,)."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    act(flat)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
