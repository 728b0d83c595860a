"""What a checkpoint holds of a training run, by name and whole, however the weights are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import TypedDict

from align.recipe.errors import UserError
from align.recipe.schema import Optim
from align.training.runs.checkpoint import Tensors, copied, load_checkpoint

Named = dict[str, nn.Parameter]
MOST = 2**53  # what a number of JSON counts to exactly
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


def trained_parameters(model: nn.Module) -> Named:
    """What trains, under the names it has without the wrappers of DDP and FSDP."""
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module, optim: Optim, rates: dict[str, float]) -> torch.optim.AdamW:
    """Over what trains; vectors (norms, biases) are not decayed.

    Parameters whose name has a name in `rates` in it form a group with that multiple of the learning rate.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, p in trained_parameters(model).items():
        own = next((group for group in rates if group in name), "")
        members.setdefault((own, p.ndim >= 2), []).append(p)
    groups = [
        {"params": params, "weight_decay": optim.weight_decay * decayed, "name": own, "share": rates.get(own, 1.0)}
        for (own, decayed), params in members.items()
    ]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.eps, fused=True)


def make_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Those that are not there yet, as AdamW makes them at its first step: side by side, before there are activations.
    Small pieces that stay between these would leave holes in a CPU's heap which those of the next row do not fit."""
    for p in parameters:
        if p not in optimizer.state:
            step = torch.zeros((), device=p.device)
            optimizer.state[p] = dict(zip(MOMENTS, (step, torch.zeros_like(p), torch.zeros_like(p)), strict=True))


def capture(named: Named, optimizer: torch.optim.Optimizer, keep: bool = True) -> Tensors:
    """Copies of weights and AdamW moments, on the CPU; with shards, every process must call it, and those that do not
    `keep` get none."""
    moments = {f"{name}/{key}": value for name, p in named.items() for key, value in optimizer.state.get(p, {}).items()}
    return {"model": gathered(named, keep, copies=True), "optimizer": gathered(moments, keep, copies=True)}


def gathered(tensors: Mapping[str, Tensor], keep: bool, copies: bool = False) -> dict[str, Tensor]:
    """Tensors whole, those of shards on the CPU, one after another; none where this process does not `keep` them.

    With shards, every process must call it. `copies`: the others are copied; what was gathered is a copy already.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor).detach().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = copied(full) if copies and full is tensor else full
    return found


class _State(TypedDict):
    """What the loop goes on from, besides tensors; JSON holds it."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)  # type: ignore[misc]

    step: Annotated[int, Field(ge=0, le=MOST)]
    place: Annotated[int, Field(ge=0, le=MOST)]
    tokens_seen: Annotated[int, Field(ge=0)]
    elapsed_seconds: Annotated[float, Field(ge=0)]
    memory: dict[str, Any]
    identity: dict[str, Any]
    portions: dict[str, Annotated[int, Field(gt=0)]]
    fingerprint: str
    lora: dict[str, Any] | None
    labels: list[str] | None


STATE = TypeAdapter(_State)


def state_of(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint at `path`, whose name is its step's. Raises UserError where it is not as align writes
    it."""
    try:
        STATE.validate_python(state)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path} is no checkpoint of a run (state.json: {where}: {fault['msg']})") from None
    if f"{state['step']:06d}" != path.name.rpartition("-")[2]:
        raise UserError(f"{path} is no checkpoint of a run (state.json: step: it is that of step {state['step']})")
    return state


def restore(path: Path, named: Named, optimizer: torch.optim.Optimizer, fingerprint: str) -> dict[str, Any]:
    """Put a checkpoint's tensors back; its `state`. Raises UserError if it is of another trunk or other weights."""
    tensors, state = load_checkpoint(path)
    state_of(path, state)
    if state["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} was trained on a trunk with fingerprint {state['fingerprint']}, but model.base now has "
            f"{fingerprint}; restore the base, or start over with --fresh"
        )
    if tensors.get("model", {}).keys() != named.keys():
        raise UserError(f"{path} holds other weights than this recipe trains; start over with --fresh")
    moments = tensors.get("optimizer", {})
    if state["step"] and not moments:
        raise UserError(
            f"{path} has no moments of AdamW, which has made {state['step']:,} steps; start over with --fresh"
        )
    put_back(path, tensors["model"], moments, named, optimizer)
    return state


def kept_portions(now: dict[str, int], before: dict[str, int]) -> tuple[dict[str, int], str]:
    """The portions of before, but for what there is no room for now; and what there is to say of that."""
    kept = {name: min(value, before.get(name, value)) for name, value in now.items()}
    less = [name for name in kept if kept[name] < before.get(name, 0)]
    told = ", ".join(f"{name} {kept[name]:,} in place of {before[name]:,}" for name in less)
    return kept, f"less memory is free than before ({told}): the last digits may differ" if less else ""


def put_back(
    path: Path,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    named: Named,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Whole tensors into the parameters of these names, and `name/key` ones into the optimizer's state.

    Raises UserError for tensors, which came from `path`, that do not fit.
    """
    owners = {key.rpartition("/")[0] for key in moments}
    if lacking := sorted({f"{name}/{key}" for name in owners for key in MOMENTS} - moments.keys()):
        raise UserError(f"{path} does not fit this run: it has no {lacking[0]}")
    wanted = {name: p.shape for name, p in named.items()}
    of_moments = {f"{name}/{key}": () if key == "step" else p.shape for name, p in named.items() for key in MOMENTS}
    for shapes, given in ((wanted, weights), (of_moments, moments)):
        for name, t in given.items():
            if shapes.get(name) != t.shape or not t.is_floating_point():
                raise UserError(f"{path} does not fit this run: its {name} is of {t.dtype}, {[*t.shape]}")
            if not torch.isfinite(t).all():
                raise UserError(f"{path} cannot be gone on with: its {name} has values that are not finite")
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(_like(weights[name], p))
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        p = named[name]
        own = value.clone()  # else it would go on to be a part of the file
        optimizer.state[p][moment] = own.to(p.device) if own.ndim == 0 else _like(own, p)  # the former its step


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(full: Tensor, p: Tensor) -> Tensor:
    if isinstance(p, DTensor):
        # Every process has read the same file, so nothing has to be sent.
        return distribute_tensor(full.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return full.to(p.device)
