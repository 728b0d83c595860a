"""The same numbers in less time on a CPU. Nothing here is needed to train."""

from __future__ import annotations

from torch import nn

from align.models.acceleration import Offer
from align.models.cpu import compiled
from align.models.cpu.fixed import fixed_products, prepare_products, sampling_bytes
from align.models.cpu.fused import fuse
from align.models.cpu.packed import alone, arranges
from align.models.cpu.segments import segment_attention
from align.models.cpu.traced import traced_attention


def _remarks(model: nn.Module) -> list[str]:
    wants = compiled.suits() and any(arranges(p) for p in model.parameters() if not p.requires_grad)
    if wants and compiled.library() is None:
        return ["PyTorch does alone what C kernels do faster: they could not be compiled (is gcc there?)"]
    return []


OFFER = Offer(
    attention=segment_attention,
    adopt=fuse,
    for_training=prepare_products,
    for_sampling=fixed_products,
    sampling_bytes=sampling_bytes,
    linear=alone,
    traced=traced_attention,
    remarks=_remarks,
)
