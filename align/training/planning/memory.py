"""What a run holds on one device: its parts, the moments at which they come together, and the largest of these.

A moment is a sum of parts that are there at once. The plan's peak is that of the largest moment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from align.models.base import compute_dtype
from align.models.memory import MOST_PROMPTS, Budgets, budgets, cached_token_bytes
from align.recipe.schema import BaseRecipe, Model
from align.training.planning.activations import Row, Way, row
from align.training.planning.devices import Device
from align.training.planning.load import Load, expected, rewarded
from align.training.planning.skeleton import Skeleton, joined

PACKED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}  # bytes a weight; nf4 has a float32 scale for each block of 64
COPIES = 2**31  # bytes of prepared weights on a CPU, as in models/cpu/joined.py
LIBRARIES = 140 * 10**6  # resident on a CPU besides: code that is first run, threads, gaps (seen: 30 to 290 MB)
HEADROOM = 0.9  # share of what is free that rows may take where `batch.row_tokens` is auto
MOST_ROW = {"cpu": 2048, "cuda": 16_384}  # tokens that keep the device busy; more only costs memory
LEAST_ROW = 256
FEW_LOGITS = 5  # tensors of the vocabulary that the choice of a token makes
WITHOUT_REFERENCE = ("simpo", "orpo")


class Part(NamedTuple):
    """Something that takes memory."""

    name: str
    bytes: int


class Moment(NamedTuple):
    """What is there at once."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(part.bytes for part in self.parts)


class Memory(NamedTuple):
    """Of one device."""

    moments: tuple[Moment, ...]
    row: Row  # of the largest row
    load: Load
    cache_tokens: int  # keys and values that are kept at once

    @property
    def peak(self) -> Moment:
        """The largest moment."""
        return max(self.moments, key=lambda moment: moment.bytes)


class Setting(NamedTuple):
    """A run and where it runs."""

    recipe: BaseRecipe
    device: Device
    processes: int
    skeleton: Skeleton
    others: tuple[Skeleton, ...] = ()  # models beside the trunk, which judge

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
    def way(self) -> Way:
        """How a row is computed."""
        kernels = self.device.kernels and self.adapted and self.dtype == torch.bfloat16
        autocast = not self.adapted and self.dtype != torch.float32
        return Way(self.device.type, self.dtype, kernels, autocast)


def setting(recipe: BaseRecipe, device: Device, processes: int) -> Setting:
    """Raises UserError for a base that cannot be had."""
    outputs = {"reward": 1, "classify": len((getattr(recipe, "classify", None) and recipe.classify.labels) or "ab")}
    others = []
    for part in own.rewards if (own := rewarded(recipe)) else ():
        if part.model:
            others.append(Skeleton(Model(base=part.model), None))
    return Setting(
        recipe, device, processes, Skeleton(recipe.model, recipe.lora, outputs.get(recipe.stage)), tuple(others)
    )


def memory(at: Setting, length: int | None = None, load: Load | None = None) -> Memory:
    """The plan's memory. `length`: tokens of an example, where `load` is not known; default: the most."""
    held, room = _held(at), room_of(at)
    if load is None:
        load = expected(at.recipe, row_budget(at, length), at.processes, length)
    one = row(at.skeleton, at.way, load.row, load.segment)
    one = _trained_share(at, one, load)
    limits = _budgets(at, room)
    moments = [_loading(at), Moment("update", (*held, *_moments_of_adam(at), _gradients(at)))]
    moments += _learning(at, held, load, one, limits)
    if at.device.type == "cpu":  # elsewhere the copy lies in the host's memory
        copy = Part("the checkpoint's copy", 12 * trained(at) // (1 if at.adapted else at.shards))
        moments.append(Moment("saving", (*held, *_moments_of_adam(at), copy)))
    if rewarded(at.recipe):
        moments.append(_sampling(at, held, load, limits))
    return Memory(tuple(moments), one, load, limits.cache_tokens)


def room_of(at: Setting) -> int:
    """Bytes that a process has beside what it holds all the time; processes on a CPU share one memory."""
    own = at.device.memory // (at.processes if at.device.type == "cpu" else 1)
    return own - sum(part.bytes for part in _held(at))


def row_budget(at: Setting, length: int | None = None) -> int:
    """Tokens of a row: the recipe's, or as many as keep the device busy and find room; a power of two."""
    wanted, room = at.recipe.batch.row_tokens, room_of(at)
    if wanted != "auto":
        return int(wanted)
    most = MOST_ROW.get(at.device.type, MOST_ROW["cuda"])
    fixed = sum(part.bytes for part in (*_moments_of_adam(at), _gradients(at))) + _chunk(at, _budgets(at, room))
    while most > LEAST_ROW and _row_bytes(at, most, length) + fixed > HEADROOM * room:
        most //= 2
    return most


def _row_bytes(at: Setting, tokens: int, length: int | None) -> int:
    load = Load(tokens, 1, min(length or at.recipe.data.max_length, tokens), tokens, tokens)
    one = _trained_share(at, row(at.skeleton, at.way, tokens, load.segment), load)
    return _policies(at) * one.kept + one.backward


def trained(at: Setting) -> int:
    """Numbers that train."""
    sizes, head = at.skeleton.sizes, _head(at)
    if at.adapted:
        return _policies(at) * sizes.adapter + head
    match at.recipe.classify.train if at.recipe.stage == "classify" else "all":
        case "head":
            return head
        case "last_blocks":
            return head + (at.recipe.classify.blocks or 1) * sizes.layer
    return sizes.weights + head


def _policies(at: Setting) -> int:
    """Adapters that train, each with a forward pass of its own: PPO has an actor and a critic."""
    return 2 if at.recipe.stage == "ppo" else 1


def _head(at: Setting) -> int:
    if at.recipe.stage == "ppo":
        return at.skeleton.sizes.width + 1
    return (at.skeleton.outputs or 0) * at.skeleton.sizes.width


def trunk_bytes(at: Setting) -> int:
    """The whole trunk as it is held."""
    sizes, packed = at.skeleton.sizes, at.recipe.model.quantize
    wide = at.dtype.itemsize if at.adapted else 4
    if packed:
        return int(sizes.matrices * PACKED[packed] + (sizes.tables + sizes.vectors) * wide)
    return sizes.weights * wide


def _held(at: Setting) -> list[Part]:
    """What is there from the first step to the last."""
    sizes, recipe = at.skeleton.sizes, at.recipe
    parts = [Part("trunk", trunk_bytes(at) // at.shards)]
    if at.shards > 1:
        parts.append(Part("layers that are gathered", _gathered(at)))
    if at.adapted:
        own = rewarded(recipe)
        rewards = sum(part.adapter is not None for part in own.rewards) if own else 0
        roles = _policies(at) + rewards
        parts.append(Part("adapters" if roles > 1 else "adapter", 4 * (roles * sizes.adapter + _head(at))))
    if recipe.stage == "dpo" and not at.adapted and recipe.dpo.loss not in WITHOUT_REFERENCE:
        if recipe.dpo.reference != "cached":
            parts.append(Part("the reference's copy", trunk_bytes(at) // at.shards))
    if at.device.type == "cpu" and at.adapted and at.shards == 1 and at.skeleton.stored == at.dtype:
        # Weights that need no cast stay in the file's pages; those that are joined are copied out of them.
        parts.append(Part("joined weights, beside the file", joined(at.skeleton, "cpu") * at.dtype.itemsize))
    prepared = 2 * sizes.matrices * at.dtype.itemsize
    if at.way.kernels and at.shards == 1 and prepared <= COPIES:
        parts.append(Part("weights prepared for oneDNN", prepared))
    for other in at.others:
        parts.append(Part("a model that judges", other.sizes.weights * at.dtype.itemsize))
    if at.device.type == "cpu":
        parts.append(Part("PyTorch's own", LIBRARIES))
    if at.processes > 1 and at.shards == 1:
        parts.append(Part("gradients to be exchanged", 4 * trained(at)))
    return parts


def _gathered(at: Setting) -> int:
    """Layers that are whole for a moment: the one that computes, the next, and what lies outside of them."""
    sizes, wide = at.skeleton.sizes, at.dtype.itemsize if at.adapted else 4
    return wide * (2 * sizes.layer + sizes.weights - sizes.depth * sizes.layer)


def _own(at: Setting, numbers: int) -> int:
    """Of what trains, this process's: shared out where the trunk itself trains in shards."""
    return numbers // at.shards if not at.adapted else numbers


def _gradients(at: Setting) -> Part:
    return Part("gradients", 4 * _own(at, trained(at)))


def _moments_of_adam(at: Setting) -> list[Part]:
    return [Part("AdamW's moments", 8 * _own(at, trained(at)))]


def _loading(at: Setting) -> Moment:
    """The checkpoint as it is stored, then cast tensor by tensor. Shards and what is merged come by the host's memory."""
    sizes = at.skeleton.sizes
    stored = 0 if at.recipe.model.init == "random" else at.skeleton.stored.itemsize * sizes.weights
    if at.device.type != "cpu" and (at.shards > 1 or at.recipe.model.quantize):
        stored = 0
    whole = max(stored, trunk_bytes(at) // at.shards)
    return Moment("loading", (Part("weights", whole), Part("the tensor that is cast", 4 * sizes.largest)))


def _trained_share(at: Setting, one: Row, load: Load) -> Row:
    """Below the first layer that trains, nothing is kept."""
    if at.recipe.stage != "classify" or at.adapted:
        return one
    match at.recipe.classify.train:
        case "head":
            return Row(4 * load.row * at.skeleton.sizes.width, one.forward, 0)
        case "last_blocks":
            return one._replace(kept=one.kept * (at.recipe.classify.blocks or 1) // at.skeleton.sizes.depth)
    return one


def _learning(at: Setting, held: list[Part], load: Load, one: Row, limits: Budgets) -> list[Moment]:
    """Forward and backward pass of the largest row, with gradients of the rows before it."""
    recipe, adam, gradients = at.recipe, _moments_of_adam(at), _gradients(at)
    kept = Part("activations kept", _policies(at) * one.kept)
    before = [gradients] if load.rows > 1 or at.processes > 1 else []
    states = 2 * load.labels * at.skeleton.sizes.width * at.dtype.itemsize
    logits = Part("logits", 0 if at.skeleton.outputs else states + _chunk(at, limits, load.labels))
    if not at.skeleton.outputs and not at.adapted:  # gradients of the projection
        logits = logits._replace(bytes=logits.bytes + 8 * at.skeleton.sizes.vocabulary * at.skeleton.sizes.width)
    unpack = _unpacked(at)
    fixed = (*held, *adam)
    moments = [
        Moment("the loss", (*fixed, *before, kept, logits)),
        Moment("backward pass", (*fixed, *before, kept, Part("a layer's gradients", one.backward), *unpack)),
    ]
    if not before:
        moments.append(
            Moment("end of the backward pass", (*fixed, gradients, Part("a layer's gradients", one.backward)))
        )
    dpo = getattr(recipe, "dpo", None)
    if dpo and dpo.loss not in WITHOUT_REFERENCE and dpo.reference == "same_pass":
        moments.append(Moment("the reference", (*fixed, *before, kept, Part("a layer", one.forward), *unpack, logits)))
    if recipe.stage == "ppo":  # the critic's pass beside what the actor has kept
        moments.append(Moment("the critic", (*fixed, *before, kept, Part("a layer", one.forward), *unpack)))
    return moments


def _unpacked(at: Setting) -> list[Part]:
    """A quantised weight in the dtype of its product."""
    return (
        [Part("a weight, unpacked", at.skeleton.sizes.largest * at.dtype.itemsize)] if at.recipe.model.quantize else []
    )


def _chunk(at: Setting, limits: Budgets, labels: int | None = None) -> int:
    """Logits that are held at once: float32, and in the products' dtype besides."""
    rows = max(1, limits.logits_bytes // (4 * at.skeleton.sizes.vocabulary))
    rows = rows if labels is None else min(rows, labels)
    wide = 4 + (at.dtype.itemsize if at.dtype != torch.float32 else 0)
    entropies = 4 if rewarded(at.recipe) else 0
    return rows * at.skeleton.sizes.vocabulary * (wide + entropies)


def _budgets(at: Setting, room: int) -> Budgets:
    """As the loaded trunk would have them."""
    place = torch.device(at.device.type if at.device.type == "cpu" else "meta")
    found = budgets(at.skeleton.text, at.dtype, place, max(room, 0))
    return found.asked(at.recipe.batch.cache_tokens)


def _sampling(at: Setting, held: list[Part], load: Load, limits: Budgets) -> Moment:
    """Keys and values of the responses that are sampled at once."""
    longest = load.prompt + load.answer
    at_once = min(load.episodes, max(limits.cache_tokens // longest, rewarded(at.recipe).samples))
    token = cached_token_bytes(at.skeleton.text, at.dtype)
    prompts = min(MOST_PROMPTS, load.prompt * at_once // rewarded(at.recipe).samples)
    one = row(at.skeleton, at.way, max(prompts, 1), load.prompt)
    recorded = prompts * token + one.forward
    parts = [*held, *_moments_of_adam(at), Part("keys and values", max(at_once * longest * token, recorded))]
    if at.shards > 1:
        parts.append(Part("the whole trunk, while it samples", trunk_bytes(at)))
    if at.way.kernels:
        parts.append(Part("weights prepared for sampling", at.skeleton.sizes.matrices * at.dtype.itemsize))
    logits = FEW_LOGITS * at_once * at.skeleton.sizes.vocabulary * 4
    return Moment("sampling", (*parts, Part("logits", logits), *_unpacked(at)))
