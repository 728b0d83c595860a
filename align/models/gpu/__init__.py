"""The same numbers in less time on a GPU. Nothing here is needed to train."""

from __future__ import annotations

from torch import nn

from align.models.acceleration import Offer
from align.models.cpu import fused
from align.models.cpu.fixed import fixed_products
from align.models.gpu import pointwise
from align.models.gpu.flex import flex_attention
from align.models.gpu.replay import Recorder, Replayed, cuda_graph, never_waiting


def _adopt(model: nn.Module, joins: bool = True) -> None:
    if not next(model.parameters()).is_meta and not pointwise.missing():  # a plan's model computes nothing
        fused.KERNELS["cuda"] = pointwise
    fused.fuse(model, joins)


def _remarks(_model: nn.Module) -> list[str]:
    why = pointwise.missing()
    return [f"norms and gates are several kernels each, for they cannot be compiled ({why})"] if why else []


def _replayed() -> Replayed:
    return Replayed(Recorder(never_waiting, cuda_graph))


OFFER = Offer(attention=flex_attention, adopt=_adopt, for_sampling=fixed_products, replayed=_replayed, remarks=_remarks)
