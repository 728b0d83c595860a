"""The one door to `cpu/` and `gpu/`: the same numbers in less time, on the device where a trunk is.

Each of the two folders makes an `OFFER`. Nothing in them is needed: without a folder, or on another device, everything
is computed the plain way. Nobody else imports from them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from align.models.attention import Attention

if TYPE_CHECKING:
    from align.models.trunk import Trunk

Linear = Callable[[Tensor], Tensor]  # (n, i) -> (n, o)
Step = Callable[[Tensor], Tensor]
FOLDERS = {"cpu": "cpu", "cuda": "gpu"}  # by device


class Plain:
    """A step that is run as it is, every time."""

    recorder = None

    def renew(self) -> None:
        """Before a step that works at other places than the last."""

    def __call__(self, step: Step, given: Tensor) -> Tensor:
        """What the step returns."""
        return step(given)


def plain_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """W x + b."""
    return partial(linear, weight=weight, bias=bias)


class Offer(NamedTuple):
    """What a folder has; the defaults are the plain way."""

    attention: Attention | None = None
    """Attention over a forest, with the values of `dense_attention`."""
    adopt: Callable[[nn.Module, bool], None] = lambda part, joins: None
    """Puts modules of a trunk or a part of it in place, those that agree with the stock ones. Called again for new
    adapters. Only where it `joins` may it keep weights in another tensor."""
    for_training: Callable[[Trunk], None] = lambda trunk: None
    """Prepares frozen weights."""
    for_sampling: Callable[[Trunk, int], AbstractContextManager] = lambda trunk, rows: nullcontext()
    """While nothing trains: products prepared for about so many rows."""
    sampling_bytes: Callable[[nn.Module], int] = lambda trunk: 0
    """Bytes of what is prepared then."""
    linear: Callable[[Tensor, Tensor | None, int], Linear] = plain_linear
    """W x + b without gradient, prepared once for about so many rows at a time."""
    replayed: Callable[[], Plain] = Plain
    """What runs a step of sampling that is the same work at the same places every time."""
    traced: Attention | None = None
    """`attention` without its numbers: what it makes and keeps, on the meta device, for a plan. Default: operands,
    result and one number for each query and head are kept."""
    remarks: Callable[[Trunk], list[str]] = lambda trunk: []
    """What a user should know of what is missing."""


def there_is(folder: str) -> bool:
    """Whether this folder has its modules; what git leaves of one, with bytecode alone, has none."""
    spec = find_spec(f"{__package__}.{folder}")
    return spec is not None and spec.origin is not None


def offer(device: torch.device) -> Offer:
    """What there is for a device."""
    folder = FOLDERS.get(device.type)
    if folder is None or not there_is(folder):
        return Offer()
    return import_module(f"{__package__}.{folder}").OFFER


def attention(device: torch.device) -> Attention | None:
    """A faster function for attention over a forest on this device, if there is one."""
    return offer(device).attention


def adopt(trunk: Trunk) -> None:
    """Put in place what is faster, after the plain trunk stands. Again where adapters were added."""
    put = offer(trunk.device).adopt
    if not trunk.sharded:
        put(trunk, True)
        return
    for layer in trunk.layers:
        with trunk.whole(layer):
            put(layer, False)
    with trunk.whole(trunk):
        for part in trunk.decoder.children():
            if trunk.layers[0] not in part.modules():
                put(part, False)


def for_training(trunk: Trunk) -> None:
    """Frozen weights prepared for a training; of a sharded trunk none, for what is prepared is a whole copy."""
    if not trunk.sharded:
        offer(trunk.device).for_training(trunk)


def for_sampling(trunk: Trunk, rows: int) -> AbstractContextManager:
    """The context in which nothing trains: products prepared for about so many rows at a time."""
    return offer(trunk.device).for_sampling(trunk, rows)


def sampling_bytes(trunk: Trunk) -> int:
    """Bytes of what `for_sampling` and `prepared` hold while it samples."""
    return 0 if trunk.sharded else offer(trunk.device).sampling_bytes(trunk)


def prepared(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """W x + b without gradient, for about so many rows at a time."""
    return offer(weight.device).linear(weight, bias, rows)


def replayed(trunk: Trunk) -> Plain:
    """What runs the steps of a sampling. The hooks of a sharded trunk cannot be recorded."""
    return Plain() if trunk.sharded else offer(trunk.device).replayed()


def remarks(trunk: Trunk) -> list[str]:
    """What a user should know of what is missing."""
    return offer(trunk.device).remarks(trunk)
