"""The same numbers in less time on a GPU. Nothing here is needed to train. Norms, gates and prepared products are those
of `cpu/`, with other kernels: without that folder they are the plain ones."""

from __future__ import annotations

from torch import nn

from align.models.acceleration import Offer, there_is
from align.models.gpu import pointwise
from align.models.gpu.flex import flex_attention
from align.models.gpu.replay import Recorder, Replayed, cuda_graph, never_waiting


def _remarks(_model: nn.Module) -> list[str]:
    why = pointwise.missing()
    return [f"norms and gates are several kernels each, for they cannot be compiled ({why})"] if why else []


def _replayed() -> Replayed:
    return Replayed(Recorder(never_waiting, cuda_graph))


def _offer() -> Offer:
    plain = Offer(attention=flex_attention, replayed=_replayed)
    if not there_is("cpu"):
        return plain
    from align.models.cpu import fused
    from align.models.cpu.fixed import fixed_products

    def adopt(model: nn.Module, joins: bool = True) -> None:
        if not next(model.parameters()).is_meta and not pointwise.missing():  # a plan's model computes nothing
            fused.KERNELS["cuda"] = pointwise
        fused.fuse(model, joins)

    return plain._replace(adopt=adopt, for_sampling=fixed_products, remarks=_remarks)


OFFER = _offer()
