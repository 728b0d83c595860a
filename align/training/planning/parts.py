"""The parts of a run's memory that its rows do not change: weights, adapters, gradients, moments, copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from align.models.base import compute_dtype
from align.recipe.schema import BaseRecipe, Model
from align.training.planning.activations import Way
from align.training.planning.devices import Device
from align.training.planning.load import answering_of, sampling_of
from align.training.planning.skeleton import Skeleton, joined

PACKED = {"4bit": 0.5 + 1 / 64 + 4 / 64 / 256, "8bit": 1.0}  # bytes a weight: NF4 with double quantisation; int8
COPIES = 2**31  # bytes of prepared weights on a CPU, as in models/cpu/packed.py
# Resident on a CPU besides: code that is first run, threads, gaps (seen: 0 to 170 MB); and with gloo (60 to 280 MB).
LIBRARIES, WITH_GLOO = 60 * 10**6, 140 * 10**6
PACKING = 100 * 10**6  # what bitsandbytes takes on a CPU besides (seen: 110 to 280 MB)
WITHOUT_REFERENCE = ("simpo", "orpo")


class Part(NamedTuple):
    """Something that takes memory."""

    name: str
    bytes: int


class Setting(NamedTuple):
    """A run and where it runs."""

    recipe: BaseRecipe
    device: Device
    processes: int
    skeleton: Skeleton
    judges: tuple[Skeleton, ...] = ()  # models beside the trunk
    teacher: Skeleton | None = None  # of a distillation, where it has a trunk of its own

    @property
    def adapted(self) -> bool:
        """Whether the trunk is frozen under a LoRA."""
        return self.recipe.lora is not None

    @property
    def shards(self) -> int:
        """Processes that a weight lies over."""
        return self.processes if self.recipe.train.shard == "layers" else 1

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        choice = self.recipe.model.dtype
        return self.device.dtype if choice == "auto" else compute_dtype(choice, torch.device("meta"))

    @property
    def arranged(self) -> int:
        """Bytes of a copy of the weights that is laid out for its products; packed ones have none, nor has DoRA."""
        ready = self.way.kernels and not self.recipe.model.quantize and not self.recipe.lora.dora
        return self.skeleton.sizes.matrices * self.dtype.itemsize * ready

    @property
    def copied(self) -> int:
        """Bytes of a copy of the layers' weights while it samples."""
        matrices = self.skeleton.sizes.matrices * self.dtype.itemsize
        plain = self.adapted and not self.recipe.model.quantize and not self.recipe.lora.dora
        floats = self.device.type == "cpu" and self.dtype == torch.float32
        return self.arranged or matrices * (plain and floats and matrices <= COPIES)

    @property
    def copied_head(self) -> int:
        """The same of the output head, of which there is none where the model scores."""
        sizes = self.skeleton.sizes
        if self.device.type != "cpu" or self.skeleton.outputs:
            return 0
        head = sizes.vocabulary * sizes.width * self.dtype.itemsize
        return head * (self.way.kernels or (self.dtype == torch.float32 and head <= COPIES))

    @property
    def way(self) -> Way:
        """How a row is computed."""
        kernels = self.device.kernels and self.adapted and self.dtype == torch.bfloat16
        autocast = not self.adapted and self.dtype != torch.float32
        return Way(self.device.type, self.dtype, kernels, autocast)


def setting(recipe: BaseRecipe, device: Device, processes: int) -> Setting:
    """Raises UserError for a base that cannot be had."""
    outputs = {"reward": 1, "classify": len((getattr(recipe, "classify", None) and recipe.classify.labels) or "ab")}
    judges = tuple(Skeleton(Model(base=part.model), None) for part in rewards_of(recipe) if part.model)
    teacher = None
    if recipe.stage == "distill" and recipe.distill.teacher.base:
        teacher = Skeleton(Model(base=recipe.distill.teacher.base, quantize=recipe.model.quantize), None)
    own = Skeleton(recipe.model, recipe.lora, outputs.get(recipe.stage))
    return Setting(recipe, device, processes, own, judges, teacher)


def rewards_of(recipe: BaseRecipe) -> Sequence[Any]:
    """The parts of a reward, where a stage has one, and what scores the answers of `train.generate`."""
    return [*getattr(sampling_of(recipe), "rewards", ()), *getattr(answering_of(recipe), "scores", ())]


def trained(at: Setting) -> int:
    """Numbers that train."""
    sizes, head = at.skeleton.sizes, _head(at)
    if at.adapted:
        return policies(at) * sizes.adapter + head
    match at.recipe.classify.train if at.recipe.stage == "classify" else "all":
        case "head":
            return head
        case "last_blocks":
            return head + (at.recipe.classify.blocks or 1) * sizes.layer
    return sizes.weights + head


def policies(at: Setting) -> int:
    """Adapters that train, each with a forward pass of its own: PPO has an actor and a critic."""
    return 2 if at.recipe.stage == "ppo" else 1


def _head(at: Setting) -> int:
    if at.recipe.stage == "ppo":
        return at.skeleton.sizes.width + 1
    return (at.skeleton.outputs or 0) * at.skeleton.sizes.width


def trunk_bytes(at: Setting) -> int:
    """The whole trunk as it is held."""
    return _whole(at.skeleton, wide(at))


def teacher_bytes(at: Setting) -> int:
    """The whole teacher of a distillation, where it has a trunk of its own; else nothing."""
    return _whole(at.teacher, at.dtype.itemsize) if at.teacher else 0


def host_bytes(at: Setting, hosts: int) -> int:
    """Of one host's own memory, while its processes load a base that they will share out over their GPUs: each reads
    all of it. What is not changed stays in the file's pages, which they have in common."""
    if at.device.type == "cpu" or at.shards == 1:
        return 0
    model, sizes = at.recipe.model, at.skeleton.sizes
    changed = bool(model.adapters or model.quantize or model.init == "random")
    changed |= at.skeleton.stored.itemsize != wide(at)
    if not changed:
        return at.skeleton.stored.itemsize * sizes.weights
    return at.processes // hosts * (4 * sizes.weights if model.adapters and not model.quantize else trunk_bytes(at))


def _whole(skeleton: Skeleton, wide: int) -> int:
    """A model's weights, those that are not packed of so many bytes."""
    sizes, packed = skeleton.sizes, skeleton.model.quantize
    if packed:
        return int(sizes.matrices * PACKED[packed] + (sizes.tables + sizes.vectors) * wide)
    return sizes.weights * wide


def wide(at: Setting) -> int:
    """Bytes of a number of the trunk."""
    return at.dtype.itemsize if at.adapted else 4


def held(at: Setting) -> list[Part]:
    """What is there from the first step to the last."""
    sizes, recipe = at.skeleton.sizes, at.recipe
    parts = [Part("trunk", trunk_bytes(at) // at.shards)]
    if at.shards > 1:
        parts.append(Part("layers that are gathered", _gathered(at.skeleton, wide(at))))
    if at.adapted:
        roles = policies(at) + sum(part.adapter is not None for part in rewards_of(recipe))
        if recipe.stage == "distill":
            roles += recipe.distill.teacher.adapter is not None
        parts.append(Part("adapters" if roles > 1 else "adapter", 4 * (roles * sizes.adapter + _head(at))))
    if recipe.stage == "dpo" and not at.adapted and asks_reference(recipe):
        parts.append(Part("the reference's copy", trunk_bytes(at) // at.shards))
    if at.device.type == "cpu" and at.adapted and at.shards == 1 and at.skeleton.stored == at.dtype:
        # Weights that need no cast stay in the file's pages; those that are joined are copied out of them.
        parts.append(Part("joined weights, beside the file", joined(at.skeleton, "cpu") * at.dtype.itemsize))
    if at.shards == 1 and 0 < 2 * at.arranged <= COPIES and not at.recipe.lora.dropout:
        parts.append(Part("weights prepared for oneDNN", 2 * at.arranged))
    for judge in at.judges:
        parts.append(Part("another model", _whole(judge, at.dtype.itemsize)))
    if at.teacher:
        parts.append(Part("the teacher", teacher_bytes(at) // at.shards))
    if at.device.type == "cpu":
        parts.append(Part("PyTorch's own", WITH_GLOO if at.processes > 1 else LIBRARIES))
    if at.device.type == "cpu" and at.recipe.model.quantize:
        parts.append(Part("bitsandbytes' own", PACKING))
    if at.processes > 1 and at.shards == 1:
        parts.append(Part("gradients to be exchanged", 4 * trained(at)))
    return parts


def _gathered(skeleton: Skeleton, wide: int) -> int:
    """Layers that are whole for a moment: the one that computes, the next, and what lies outside of them."""
    sizes, packed = skeleton.sizes, skeleton.model.quantize
    layer = int(sizes.layer * (PACKED[packed] if packed else wide))
    return 2 * layer + wide * (sizes.weights - sizes.depth * sizes.layer)


def teaching(at: Setting) -> list[Part]:
    """Of a teacher that is sharded, what is whole while it is read."""
    if at.teacher is None or at.shards == 1:
        return []
    return [Part("the teacher's layers that are gathered", _gathered(at.teacher, at.dtype.itemsize))]


def gradients(at: Setting) -> Part:
    """Of what trains: this process's where the trunk itself trains in shards; an adapter's are whole until clipped."""
    return Part("gradients", 4 * trained(at) // (1 if at.adapted else at.shards))


def moments_of_adam(at: Setting) -> list[Part]:
    """Of what this process steps."""
    return [Part("AdamW's moments", 8 * trained(at) // at.shards)]


def asks_reference(recipe: BaseRecipe) -> bool:
    """Whether DPO computes its reference row by row."""
    return recipe.dpo.loss not in WITHOUT_REFERENCE and recipe.dpo.reference == "same_pass"


def unpacked(at: Setting) -> list[Part]:
    """A quantised weight in the dtype of its product."""
    if not at.recipe.model.quantize:
        return []
    largest = max(one.sizes.matrix for one in (at.skeleton, at.teacher) if one)
    return [Part("a weight, unpacked", largest * at.dtype.itemsize)]
