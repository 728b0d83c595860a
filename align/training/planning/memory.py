"""What a run holds on one device: its parts, the moments at which they come together, and the largest of these.

A moment is a sum of parts that are there at once. The plan's peak is that of the largest moment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from align.models.memory import MOST_PROMPTS, Budgets, budgets, cached_token_bytes
from align.training.planning.activations import Row, row
from align.training.planning.load import Drawn, Load, drawings, expected, sampling_of
from align.training.planning.parts import (
    Part,
    Setting,
    asks_reference,
    gradients,
    held,
    moments_of_adam,
    policies,
    teaching,
    trained,
    trunk_bytes,
    unpacked,
    wide,
)

HEADROOM = 0.9  # share of what is free that rows may take where `batch.row_tokens` is auto
MOST_ROW = {"cpu": 2048, "cuda": 16_384}  # tokens that keep the device busy; more only costs memory
LEAST_ROW = 256
SENT = 2 * 250 * 2**20  # bytes of weights that DDP sends round at once as it begins (PyTorch: buckets of 250 MB)
GAPS = 0.15  # of activations, in a CPU's heap, where sampling comes between rows of other lengths (seen: 0.1 to 0.3)
FEW_LOGITS = 5  # tensors of the vocabulary that the choice of a token makes


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


def memory(at: Setting, length: int | None = None, load: Load | None = None) -> Memory:
    """The plan's memory. `length`: tokens of an example, where `load` is not known; default: the most."""
    always, room = held(at), room_of(at)
    if load is None:
        load = expected(at.recipe, row_budget(at, length), at.processes, length)
    one = row(at.skeleton, at.way, load.row, load.segment)
    one = _trained_share(at, one, load)
    limits = _budgets(at, room)
    moments = [_loading(at), Moment("update", (*always, *moments_of_adam(at), gradients(at)))]
    moments += _learning(at, always, load, one, limits)
    if at.device.type == "cpu":  # elsewhere the copy lies in the host's memory
        copy = Part("the checkpoint's copy", 12 * trained(at))  # whole in the first process
        moments.append(Moment("saving", (*always, *moments_of_adam(at), copy)))
    if at.processes > 1 and at.shards == 1:
        copies = Part("weights that are sent round", min(SENT, trunk_bytes(at)))
        moments.append(Moment("DDP's beginning", (*always, copies)))
    for name, drawn in drawings(at.recipe, load, at.processes, length):
        moments.append(_sampling(name, at, always, drawn, limits))
    return Memory(tuple(moments), one, load, limits.cache_tokens)


def room_of(at: Setting) -> int:
    """Bytes that a process has beside what it holds all the time; processes on a CPU share one memory."""
    own = at.device.memory // (at.processes if at.device.type == "cpu" else 1)
    return own - sum(part.bytes for part in held(at))


def row_budget(at: Setting, length: int | None = None) -> int:
    """Tokens of a row: the recipe's, or as many as keep the device busy and find room; a power of two."""
    wanted, room = at.recipe.batch.row_tokens, room_of(at)
    if wanted != "auto":
        return int(wanted)
    most = MOST_ROW.get(at.device.type, MOST_ROW["cuda"])
    fixed = sum(part.bytes for part in (*moments_of_adam(at), gradients(at))) + _chunk(at, _budgets(at, room))
    while most > LEAST_ROW and _row_bytes(at, most, length) + fixed > HEADROOM * room:
        most //= 2
    return most


def _row_bytes(at: Setting, tokens: int, length: int | None) -> int:
    load = Load(tokens, 1, min(length or at.recipe.data.max_length, tokens), tokens, tokens)
    one = _trained_share(at, row(at.skeleton, at.way, tokens, load.segment), load)
    return policies(at) * one.kept + one.backward


def _loading(at: Setting) -> Moment:
    """The checkpoint as it is stored, then cast tensor by tensor; on a CPU the file's pages stay until all of it is
    cast. A trunk is whole before it is sharded; beside a GPU that is in the host's memory."""
    stored, whole = at.skeleton.stored.itemsize * at.skeleton.sizes.weights, trunk_bytes(at)
    if at.recipe.model.init == "random":
        stored = 0
    if at.device.type == "cpu":
        if stored and at.skeleton.stored.itemsize == wide(at) and not at.recipe.model.quantize:
            whole = whole // at.shards if at.shards > 1 else 0  # they are the file's pages, of which shards are copies
        return Moment("loading", (Part("the file", stored), Part("weights", whole)))
    if at.shards > 1 or at.recipe.model.quantize:
        stored = 0
    cast = Part("the tensor that is cast", 4 * at.skeleton.sizes.largest)
    return Moment("loading", (Part("weights", max(stored, whole // at.shards)), cast))


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


def _learning(at: Setting, always: list[Part], load: Load, one: Row, limits: Budgets) -> list[Moment]:
    """Forward and backward pass of the largest row, with gradients of the rows before it."""
    recipe, adam, slopes = at.recipe, moments_of_adam(at), gradients(at)
    kept = Part("activations kept", policies(at) * one.kept)
    before = [slopes] if load.rows > 1 or at.processes > 1 else []
    if at.device.type == "cpu" and sampling_of(recipe):
        always = [*always, Part("gaps between activations", int(GAPS * kept.bytes))]
    logits, unpack = _logits(at, limits, load.labels), unpacked(at)
    fixed = (*always, *adam)
    moments = [
        Moment("the loss", (*fixed, *before, kept, logits, *teaching(at))),
        Moment("backward pass", (*fixed, *before, kept, Part("a layer's gradients", one.backward), *unpack)),
    ]
    if not before:
        moments.append(Moment("end of the backward pass", (*fixed, slopes, Part("a layer's gradients", one.backward))))
    if recipe.stage == "dpo" and asks_reference(recipe):
        moments.append(Moment("the reference", (*fixed, *before, kept, Part("a layer", one.forward), *unpack, logits)))
    if recipe.stage in ("ppo", "grpo"):  # another role's pass beside what the actor has kept
        moments.append(Moment("another role", (*fixed, *before, kept, Part("a layer", one.forward), *unpack)))
    if recipe.stage == "distill":  # before the student's pass
        other = row(at.teacher, at.way, load.row, load.segment) if at.teacher else one
        moments.append(Moment("the teacher", (*fixed, *before, Part("a layer", other.forward), *unpack, *teaching(at))))
    if load.beside:  # the actor's alone; the only row of responses has been said, with its graph, before the first
        other, most = row(at.skeleton, at.way, load.beside.row, load.beside.segment), load.beside.row
        said = [Part("activations of the responses", kept.bytes)] if load.rows == 1 else []
        held = (*fixed, slopes, *said, Part("activations kept", other.kept))
        moments.append(Moment("ptx, the loss", (*held, _logits(at, limits, most))))
        moments.append(Moment("ptx, the backward pass", (*held, Part("a layer's gradients", other.backward), *unpack)))
    return moments


def _logits(at: Setting, limits: Budgets, labels: int) -> Part:
    """One chunk of the logits of so many labels, and the states that they come from."""
    sizes = at.skeleton.sizes
    if at.skeleton.outputs:
        return Part("logits", 0)
    projection = 0 if at.adapted else 8 * sizes.vocabulary * sizes.width  # its gradients
    states = 2 * labels * sizes.width * at.dtype.itemsize
    return Part("logits", states + _chunk(at, limits, labels) + projection)


def _chunk(at: Setting, limits: Budgets, labels: int | None = None) -> int:
    """Logits that are held at once: float32, and in the products' dtype besides."""
    rows = max(1, limits.logits_bytes // (4 * at.skeleton.sizes.vocabulary))
    rows = rows if labels is None else min(rows, labels)
    each = 4 + (at.dtype.itemsize if at.dtype != torch.float32 else 0)
    # With their entropies, or two distributions at once.
    beside = {"ppo": 4, "grpo": 4, "distill": 16}.get(at.recipe.stage, 0)
    return rows * at.skeleton.sizes.vocabulary * (each + beside)


def _budgets(at: Setting, room: int) -> Budgets:
    """As the loaded trunk would have them, which leaves room for what comes while it samples."""
    place = torch.device(at.device.type if at.device.type == "cpu" else "meta")
    later = trunk_bytes(at) - trunk_bytes(at) // at.shards if at.shards > 1 else at.copied + at.copied_head
    found = budgets(at.skeleton.text, at.dtype, place, max(room, 0), later)
    return found.asked(at.recipe.batch.cache_tokens)


def _sampling(name: str, at: Setting, always: list[Part], drawn: Drawn, limits: Budgets) -> Moment:
    """Keys and values of the responses that are sampled at once."""
    longest = drawn.prompt + drawn.answer
    at_once = min(drawn.episodes, max(limits.cache_tokens // longest, drawn.samples))
    token = cached_token_bytes(at.skeleton.text, at.dtype)
    prompts = min(MOST_PROMPTS, drawn.prompt * at_once // drawn.samples)
    one = row(at.skeleton, at.way, max(prompts, 1), drawn.prompt)
    recorded = prompts * token + one.forward
    parts = [*always, *moments_of_adam(at), Part("keys and values", max(at_once * longest * token, recorded))]
    if at.shards > 1:
        parts.append(Part("the whole trunk, while it samples", trunk_bytes(at)))
    if at.copied + at.copied_head:
        parts.append(Part("weights prepared for sampling", at.copied + at.copied_head))
    logits = FEW_LOGITS * at_once * at.skeleton.sizes.vocabulary * 4
    return Moment(name, (*parts, Part("logits", logits), *unpacked(at)))
