"""DeepSpeed's ZeRO, stages 1 to 3, for those who have its configurations: what it may ask for, and its weights whole.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) lays the optimizer's moments (1), gradients (2) and weights (3) over
the processes. It comes through accelerate's plugin. `train.shard: layers` does the same for every stage.
Under stage 3, a layer's weights are gathered together while it computes; embeddings and head stay whole everywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.models.checkpoints.sources import foreign
from align.models.trunk import Trunk, Whole
from align.recipe.errors import UserError
from align.recipe.schema import BaseRecipe
from align.training.runs.state import Named

HELD = -1  # stands among the modules that need a weight now, which DeepSpeed counts
STAGES = ("sft", "reward", "dpo", "classify")
ALONE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
INSTEAD = "use train.shard=layers without DeepSpeed (accelerate_configs/gpus_8_shard.yaml)"
OWN = {  # of a DeepSpeed configuration: what the recipe decides instead
    "optimizer": "optim of the recipe",
    "scheduler": "optim of the recipe",
    "fp16.enabled": "model.dtype",
    "bf16.enabled": "model.dtype",
    "amp.enabled": "model.dtype",
    "msamp.enabled": "model.dtype",
    "train_batch_size": "batch.examples",
    "train_micro_batch_size_per_gpu": "batch.row_tokens",
    "zero_optimization.cpu_offload": "nothing (moments stay on the device)",
    "zero_optimization.cpu_offload_params": "nothing (weights stay on the device)",
    "zero_optimization.zero_quantized_weights": "nothing (what is sent is not rounded)",
    "zero_optimization.zero_quantized_nontrainable_weights": "model.quantize",
    "zero_optimization.zero_quantized_gradients": "nothing (what is sent is not rounded)",
    "zero_optimization.offload_optimizer.device": "nothing (moments stay on the device)",
    "zero_optimization.offload_param.device": "nothing (weights stay on the device)",
}
UNSET = (None, "none", False, "auto")
TAKEN = {  # what else may stand in a DeepSpeed configuration: it changes no numbers
    "zero_optimization", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip
SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def asked() -> bool:
    """Whether the launcher's configuration asks for DeepSpeed."""
    return is_true("ACCELERATE_USE_DEEPSPEED", os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))


def is_true(name: str, value: str) -> bool:
    """A launcher's variable as yes or no; UserError for what is neither."""
    try:
        return str_to_bool(value) == 1
    except ValueError:
        raise UserError(f"{name} in the environment is {value!r}: set it to true or false, or unset it") from None


def ready() -> dict[str, Any]:
    """What its process group needs besides; sets what it reads from the environment. UserError if it is not there, or
    if its configuration cannot be read."""
    if find_spec("deepspeed") is None:
        raise UserError(f"the launcher asks for DeepSpeed, which is not there: pip install deepspeed, or {INSTEAD}")
    lacking = [name for name in ALONE if name not in os.environ]
    if lacking and find_spec("mpi4py") is None:  # by which it would ask MPI
        raise UserError(
            f"DeepSpeed needs a launcher, which sets {', '.join(lacking)}: accelerate launch --config_file "
            "accelerate_configs/deepspeed_zero2.yaml"
        )
    _check_stage()
    if torch.cuda.is_available():
        return {}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return {"backend": "gloo"}


def _check_stage() -> None:
    """UserError for a configuration without a stage that accelerate could read."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    where, stage = "ACCELERATE_DEEPSPEED_ZERO_STAGE", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if file != "none":
        where = f"DeepSpeed's configuration {file}"
        with foreign(f"{where} cannot be read; give a JSON file"):
            stage = _at(json.loads(Path(file).read_text(encoding="utf-8")), "zero_optimization.stage")
        where += ": zero_optimization.stage"
    if str(stage) not in ("1", "2", "3"):
        told = "is missing" if stage is None else f"is {stage!r}"
        raise UserError(f"{where} {told}: take 2 or 3, or DDP without DeepSpeed")


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
        instead = INSTEAD if hasattr(recipe, "train") else "launch it without DeepSpeed"
        raise UserError(f"DeepSpeed cannot run align.{recipe.stage} (it runs {', '.join(STAGES)}): {instead}")
    if recipe.train.shard != "none":
        problems.append("train.shard: DeepSpeed shards by itself; take one of the two")
    for key, instead in OWN.items():
        if _at(config, key) not in UNSET:
            problems.append(f"DeepSpeed's {key}: leave it out, {instead} decides")
    for key in sorted(config.keys() - TAKEN - {key.partition(".")[0] for key in OWN}):
        part = config[key]
        if (part.get("enabled", True) if isinstance(part, dict) else part) not in UNSET:
            problems.append(f"DeepSpeed's {key}: leave it out, nothing here goes by it")
    if (steps := config.get("gradient_accumulation_steps")) not in (*UNSET, 1):
        problems.append(f"DeepSpeed's gradient_accumulation_steps is {steps}: set it to 1, batch.examples decides")
    most = recipe.optim.max_grad_norm or 0.0
    if (clip := config.get("gradient_clipping")) not in (*UNSET, most):
        problems.append(f"DeepSpeed's gradient_clipping is {clip}: leave it out, optim.max_grad_norm ({most}) decides")
    if any(part.adapter for part in getattr(getattr(recipe.train, "generate", None), "scores", ())):
        problems.append("train.generate.scores: DeepSpeed cannot have adapters beside what trains; give a `model`")
    if stage_of(accelerator) == 3:
        for key in ("quantize", "gradient_checkpointing"):
            if getattr(recipe.model, key):
                problems.append(f"model.{key} does not go with ZeRO-3: leave it out, or {INSTEAD}")
    if problems:
        raise UserError(*problems)
    unset_hf_deepspeed_config()  # else transformers would lay out weights by itself while it loads them
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": most}
    for key in SIZES:
        if config["zero_optimization"].get(key) == "auto":  # accelerate would look for them in a transformers model
            del config["zero_optimization"][key]
    _check_fields(config)


def _check_fields(config: dict[str, Any]) -> None:
    """UserError for what DeepSpeed itself does not take, before data and weights are read."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        told = (f"DeepSpeed's zero_optimization.{e['loc'][0] if e['loc'] else ''}: {e['msg']}" for e in error.errors())
        raise UserError(*told) from None


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
    if HELD in getattr(p, "ds_active_sub_modules", ()):  # whole already, and to stay so
        return p.detach().to("cpu", copy=True)
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
