"""Adapters of different rows in one forward pass: the trunk's product for all rows, each adapter's for its own.

Where an adapter has many rows, they are a part of the layer's input, for which it is two small products. Where it has
few, calls take longer than their work: then all adapters of the pass are one, their As stacked and their Bs side by
side, and between the two what is not a row's own is set to 0 (Chen et al. 2023, "Punica", arXiv 2310.18547, has a
kernel for this).

What acts is a chain: adapters in the order of training, each on the trunk with those before it. The update of a chain
is their As stacked and their Bs side by side. DoRA scales what a layer computes, so it scales the Bs before it as well.

Shapes: m tokens of a pass, i and o a layer's input and output size, r the sum of a chain's ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align.models.checkpoints.results import Result
from align.models.lora import ADAPTABLE, beneath
from align.models.quantized import is_quantized
from align.models.trunk import Trunk
from align.recipe.errors import UserError

PEFT = "base_model.model."  # what peft puts before the name of a layer
BARE = 0  # the number of the trunk itself
FEW = 64  # tokens of an adapter, on average, up to which those of a pass are one
MOST_TOGETHER = 4  # of such sets that are kept: each is a copy of its adapters


class Update(NamedTuple):
    """What a chain changes in one layer: y becomes gain * (W x) + bias + B A x."""

    a: Tensor  # (r, i)
    b: Tensor  # (o, r), scaled
    gain: Tensor | None = None  # (o,), of DoRA; None: 1

    def then(self, a: Tensor, b: Tensor, gain: Tensor | None = None) -> Update:
        """With one more adapter after it, whose `gain`, if it has one, scales all."""
        if gain is None:
            return Update(torch.cat([self.a, a]), torch.cat([self.b, b], 1), self.gain)
        both = torch.cat([self.b, b], 1) * gain[:, None]
        return Update(torch.cat([self.a, a]), both, gain if self.gain is None else gain * self.gain)


Chain = dict[str, Update]  # by the layer's name


def chain_of(trunk: Trunk, results: Sequence[Result], key: str) -> Chain:
    """What adapters, in the order of training, change in the layers of a bare trunk; float32.

    Raises UserError, which names the `key`, where one has weights that are not those of LoRA on the trunk's layers.
    """
    head = beneath(trunk.head)  # its product is not the layer's own
    found = ((name, beneath(layer)) for name, layer in trunk.plain.named_modules())
    layers = {name: layer for name, layer in found if isinstance(layer, ADAPTABLE) and layer is not head}
    chain: Chain = {}
    for result in results:
        told, config = f"{key}: {result.folder}", result.config
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        for name, parts in _parts(result, told).items():
            layer = layers.get(name)
            if layer is None or isinstance(layer, nn.Embedding):
                raise UserError(f"{told} has an adapter on {name}, which cannot be served; merge it with align.merge")
            chain[name] = _added(chain.get(name), layer, parts, scale, f"{told} does not fit this trunk: {name}")
    return chain


def _parts(result: Result, told: str) -> dict[str, dict[str, Tensor]]:
    """The weights by layer and by what they are: lora_A, lora_B, and lora_magnitude_vector of DoRA."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, weight in result.weights.items():
        name, _, kind = full.removeprefix(PEFT).removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            raise UserError(f"{told} brings {full}, which is no LoRA; merge it with align.merge")
        found.setdefault(name, {})[kind] = weight.float()
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if result.config.use_dora else set())
    for name, parts in found.items():
        if parts.keys() != wanted:
            raise UserError(
                f"{told} is damaged: {name} has {', '.join(sorted(parts))}, not {', '.join(sorted(wanted))}"
            )
    return found


def _added(before: Update | None, layer: nn.Module, parts: dict[str, Tensor], scale: float, told: str) -> Update:
    """What the layer's chain is with one more adapter on it."""
    weight = layer.weight
    a, b = parts["lora_A"].to(weight.device), parts["lora_B"].to(weight.device) * scale
    if is_quantized(layer):
        o, i = len(b), a.shape[1]  # its own shape is that of packed bytes
    else:
        o, i = reversed(weight.shape) if isinstance(layer, Conv1D) else weight.shape
    if (a.shape[1], len(b)) != (i, o) or len(a) != b.shape[1]:
        raise UserError(f"{told} has matrices {tuple(a.shape)} and {tuple(b.shape)}, and the layer is ({i}, {o})")
    gain = None
    if "lora_magnitude_vector" in parts:
        if is_quantized(layer):
            raise UserError(f"{told}: DoRA cannot be put beside quantised weights")
        whole = (weight.T if isinstance(layer, Conv1D) else weight).float()
        if before is not None:
            whole = (whole if before.gain is None else before.gain[:, None] * whole) + before.b @ before.a
        gain = parts["lora_magnitude_vector"].flatten().to(weight.device) / (whole + b @ a).norm(dim=1)
    if before is None:
        before = Update(a[:0], b[:, :0])
    made = before.then(a, b, gain)
    if not all(part.isfinite().all() for part in made if part is not None):
        raise UserError(f"{told} has weights that are no finite numbers once they are scaled")
    return made


class Adapters:
    """All chains that are served, beside the layers of a bare trunk."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.known: set[int] = set()
        self.updates: dict[str, dict[int, Update]] = {}  # by layer, then by number
        self.hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.segments: list[Segment] = []  # of the pass
        self.together: Together | None = None  # where they are one
        self._known_together: dict[tuple[int, ...], Together] = {}
        self._next = BARE + 1

    def add(self, chain: Chain) -> int:
        """Its number, from now on."""
        assert not self.trunk.adapted or self.trunk.acts_as is None, "the trunk's own adapter is off"
        number, self._next = self._next, self._next + 1
        self.known.add(number)
        for name, update in chain.items():
            if name not in self.updates:
                self.updates[name] = {}
                layer = self.trunk.plain.get_submodule(name)
                self.hooks[name] = layer.register_forward_hook(_Beside(self, name, beneath(layer)))
            parts = (None if part is None else part.to(self.trunk.device, self.trunk.dtype) for part in update)
            self.updates[name][number] = Update(*parts)
        return number

    def remove(self, number: int) -> None:
        """No row has it any more."""
        self.known.discard(number)
        self._known_together.clear()
        for name in [name for name, updates in self.updates.items() if updates.pop(number, None) and not updates]:
            del self.updates[name]
            self.hooks.pop(name).remove()

    @contextmanager
    def acting(self, numbers: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
        """Within this, the tokens of a pass are so many of each of these, in rising order."""
        first = 0
        for number, count in zip(numbers, counts, strict=True):
            if number != BARE and self.segments and self.segments[-1].number == number:
                self.segments[-1] = self.segments[-1]._replace(last=first + count)
            elif number != BARE:
                self.segments.append(Segment(number, first, first + count))
            first += count
        if len(self.segments) > 1 and first - self.segments[0].first <= FEW * len(self.segments):
            self.together = self._together(tuple(segment.number for segment in self.segments))
            self.together.mark(self.segments)
        try:
            yield
        finally:
            self.segments, self.together = [], None

    def _together(self, numbers: tuple[int, ...]) -> Together:
        """These as one, kept for the next passes; the longest unused goes where there are many."""
        found = self._known_together.pop(numbers, None) or Together(self.updates, numbers)
        self._known_together[numbers] = found
        if len(self._known_together) > MOST_TOGETHER:
            del self._known_together[next(iter(self._known_together))]
        return found


class Segment(NamedTuple):
    """Tokens of a pass, side by side, that are one adapter's."""

    number: int
    first: int
    last: int


class Together:
    """Several adapters as one: in each layer all their columns, and which of them are a token's own."""

    def __init__(self, updates: dict[str, dict[int, Update]], numbers: tuple[int, ...]) -> None:
        self.layers: dict[str, tuple[Tensor, Tensor, tuple[int, ...]]] = {}  # A (R, i), B (o, R), the rank of each
        self.masks: dict[tuple[int, ...], Tensor] = {}  # by ranks: (m, R) bool
        for name, known in updates.items():
            parts = [known.get(number) for number in numbers]
            if any(part is not None and part.gain is not None for part in parts):
                continue  # what DoRA scales is scaled for its own rows alone
            there = [part for part in parts if part is not None]
            if there:
                ranks = tuple(0 if part is None else len(part.a) for part in parts)
                a, b = torch.cat([part.a for part in there]), torch.cat([part.b for part in there], 1)
                self.layers[name] = a, b.T.contiguous(), ranks

    def mark(self, segments: Sequence[Segment]) -> None:
        """The tokens of a pass."""
        self.masks.clear()
        self.counts = [segment.last - segment.first for segment in segments]

    def others(self, ranks: tuple[int, ...], device: torch.device) -> Tensor:
        """(m, R) bool, True where a column is not a token's own; made once a pass for all layers of like ranks. What
        another adapter makes of a token may be no number, so it is not multiplied away."""
        if ranks not in self.masks:
            owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            token = torch.arange(len(ranks)).repeat_interleave(torch.tensor(self.counts))
            self.masks[ranks] = (token[:, None] != owner).to(device)
        return self.masks[ranks]


class _Beside:
    """Adds to a layer's output what each adapter changes in its rows."""

    def __init__(self, adapters: Adapters, name: str, layer: nn.Module) -> None:
        self.adapters, self.name, self.layer = adapters, name, layer

    @torch.no_grad()
    def __call__(self, _layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """(…, i) and (…, o), m tokens in all."""
        segments, together = self.adapters.segments, self.adapters.together
        if not segments:
            return out
        rows, whole = args[0].reshape(-1, args[0].shape[-1]), out.reshape(-1, out.shape[-1])
        if together is not None and (joined := together.layers.get(self.name)) is not None:
            a, b, ranks = joined
            first, last = segments[0].first, segments[-1].last
            low = rows[first:last] @ a.T
            whole[first:last].addmm_(low.masked_fill_(together.others(ranks, low.device), 0), b)
            return whole.view(out.shape)
        updates = self.adapters.updates[self.name]
        for number, first, last in segments:
            if (update := updates.get(number)) is None:
                continue
            part = whole[first:last]
            if update.gain is not None:
                bias = self.layer.bias
                part.mul_(update.gain) if bias is None else part.sub_(bias).mul_(update.gain).add_(bias)
            part.addmm_(rows[first:last] @ update.a.T, update.b.T)
        return whole.view(out.shape)
