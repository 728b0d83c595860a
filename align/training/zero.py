"""DeepSpeed's ZeRO, stages 1 to 3, for those who have its configurations: what it may ask for, and its weights whole.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) lays the optimizer's moments (1), gradients (2) and weights (3) over
the processes. It comes through accelerate's plugin. `train.shard: layers` does the same for every stage.
Under stage 3, a layer's weights are gathered together while it computes; embeddings and head stay whole everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.models.trunk import Trunk, Whole
from align.recipe.errors import UserError
from align.recipe.schema import BaseRecipe
from align.training.runs.state import Named

HELD = -1  # stands among the modules that need a weight now, which DeepSpeed counts
STAGES = ("sft", "reward", "dpo", "classify")
INSTEAD = "use train.shard=layers without DeepSpeed (accelerate_configs/gpus_8_shard.yaml)"
OWN = {  # of a DeepSpeed configuration: what the recipe decides instead
    "optimizer": "optim of the recipe",
    "scheduler": "optim of the recipe",
    "fp16.enabled": "model.dtype",
    "bf16.enabled": "model.dtype",
    "zero_optimization.offload_optimizer.device": "nothing (moments stay on the device)",
    "zero_optimization.offload_param.device": "nothing (weights stay on the device)",
}
SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def asked() -> bool:
    """Whether the launcher's configuration asks for DeepSpeed."""
    return str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")) == 1


def ready() -> dict[str, Any]:
    """What its process group needs besides; sets what it reads from the environment. UserError if it is not there."""
    if find_spec("deepspeed") is None:
        raise UserError(f"the launcher asks for DeepSpeed, which is not there: pip install deepspeed, or {INSTEAD}")
    if torch.cuda.is_available():
        return {}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return {"backend": "gloo"}


def stage_of(accelerator: Accelerator) -> int:
    """ZeRO's stage, 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def settle(accelerator: Accelerator, recipe: BaseRecipe) -> None:
    """Have the plugin do what the recipe says. Raises UserError for what cannot be, all at once."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config, problems = accelerator.deepspeed_plugin.deepspeed_config, []
    if recipe.stage not in STAGES:
        raise UserError(f"DeepSpeed cannot run align.{recipe.stage} (it runs {', '.join(STAGES)}): {INSTEAD}")
    if recipe.train.shard != "none":
        problems.append("train.shard: DeepSpeed shards by itself; take one of the two")
    for key, instead in OWN.items():
        if _at(config, key) not in (None, "none", False, "auto"):
            problems.append(f"DeepSpeed's {key}: leave it out, {instead} decides")
    if any(part.adapter for part in getattr(getattr(recipe.train, "generate", None), "scores", ())):
        problems.append("train.generate.scores: DeepSpeed cannot have adapters beside what trains; give a `model`")
    stage = stage_of(accelerator)
    if stage not in (1, 2, 3):
        problems.append(f"DeepSpeed's zero_optimization.stage is {stage}: take 2 or 3, or DDP without DeepSpeed")
    if stage == 3:
        for key in ("quantize", "gradient_checkpointing"):
            if getattr(recipe.model, key):
                problems.append(f"model.{key} does not go with ZeRO-3: leave it out, or {INSTEAD}")
    if problems:
        raise UserError(*problems)
    unset_hf_deepspeed_config()  # else transformers would lay out weights by itself while it loads them
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config["gradient_clipping"] = recipe.optim.max_grad_norm or 0.0
    for key in SIZES:
        if config["zero_optimization"].get(key) == "auto":  # accelerate would look for them in a transformers model
            del config["zero_optimization"][key]


def _at(config: dict[str, Any], key: str) -> Any:
    found: Any = config
    for word in key.split("."):
        found = found.get(word) if isinstance(found, dict) else None
    return found


def layers_together(trunk: Trunk) -> Whole:
    """Mark the layers: each one's weights are gathered at once, for modules in it read each other's. Until they are
    laid over the processes they are whole."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in trunk.layers:
        set_z3_leaf_module(layer, True)
    # Else the first layer's input asks for no gradient, and its weights would be let go of before its backward pass.
    trunk.plain.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    return lambda part=None: nullcontext()


def _ask_for_gradient(_embeddings: nn.Module, _given: tuple, states: Tensor) -> Tensor:
    return states.requires_grad_() if torch.is_grad_enabled() and states.is_leaf else states


def hold_outside(trunk: Trunk) -> None:
    """What is not in a layer is whole on every process, until the next step lays it out: heads are read beside their
    forward pass. Every process must call it."""
    layered = {p for layer in trunk.layers for p in layer.parameters()}
    held = [p for p in trunk.parameters() if p not in layered]
    held[0].all_gather(held)
    for p in held:
        p.ds_active_sub_modules.add(HELD)


@contextmanager
def whole(trunk: Trunk, engine: Any, part: nn.Module | None = None) -> Iterator[None]:
    """All weights whole, and no process waits for another; every process has to come by."""
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    laid = [p for p in (part or trunk).parameters() if HELD not in p.ds_active_sub_modules]
    for p in laid:
        p.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with GatheredParameters(laid):
            yield
    finally:
        offload._register_deepspeed_module(engine.module)


def full(p: nn.Parameter) -> Tensor:
    """A parameter whole, on the CPU; every process must call it."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if p.requires_grad:
        return safe_get_full_fp32_param(p).detach().cpu()
    with GatheredParameters([p]):
        return p.detach().to("cpu", copy=True)


def moments(named: Named, engine: Any) -> Iterator[tuple[str, Tensor]]:
    """AdamW's state by `name/key`, whole, on the CPU. Every process must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(iter(engine.optimizer.optimizer.state.values()))["step"].detach().cpu()
    for name, p in named.items():
        yield f"{name}/step", step.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            yield f"{name}/{key}", safe_get_full_optimizer_state(p, key).detach().cpu()


def put_moments(before: dict[nn.Parameter, dict[str, Tensor]], engine: Any) -> None:
    """AdamW's state into DeepSpeed's parts: that of the parameters before it had them, whole, or that of a first step.

    Left to itself it would link parameters to a state that only its first group has by then.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    outer = engine.optimizer
    step = next((state["step"] for state in before.values()), torch.tensor(0.0))
    flats = getattr(outer, "fp32_partitioned_groups_flat", None) or outer.single_partition_of_fp32_groups
    for flat in flats:
        outer.optimizer.state[flat] = {
            "step": step.to(flat.device, copy=True),
            "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat),
        }  # fmt: skip
    if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
        outer._lazy_init_hp_params_optimizer_state()
    for p, state in before.items():
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(p, state[key], key)


def norm_of(engine: Any) -> float:
    """The norm of the accumulated gradients, times the loss scale; inf where it is not finite."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    outer = engine.optimizer
    if hasattr(outer, "scaled_global_norm"):
        return float(outer.scaled_global_norm())
    return float(combine_grad_norm_groups(outer._get_norm_groups()))
