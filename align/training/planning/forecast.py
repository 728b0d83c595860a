"""The plan that a run makes for itself, once its data is read: what it says of it, and what came of it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from align.models.checkpoints.sources import first_line
from align.training.borders.processes import least
from align.training.planning.load import found
from align.training.planning.memory import Memory, memory, row_budget
from align.training.planning.parts import setting
from align.training.planning.words import in_words, size

if TYPE_CHECKING:
    from align.training.loop import Loop

SMALL = 2**24  # weights; what is smaller fits everywhere, and its plan would take longer than its steps


def planned_rows(loop: Loop) -> int | str:
    """`batch.row_tokens`, or as many tokens as the memory has room for: where it is auto and the model not small.

    The same in all processes, which lay out the same rows: what fits where the least memory is free.
    """
    wanted, device, fit = loop.recipe.batch.row_tokens, loop.session.usage.device, 0
    if wanted != "auto" or device is None or _small(loop):
        return wanted
    with suppress(Exception):  # a model may be of any kind; `forecast` says that there is no plan of it
        at = setting(loop.recipe, device, loop.accelerator.num_processes)
        fit = row_budget(at, length=int(loop.data.train.longest.max()))
    return least(loop.accelerator, fit) or wanted


def forecast(loop: Loop) -> Memory | None:
    """The plan of a run; None for a small model, or where none can be made."""
    device = loop.session.usage.device
    if device is None or _small(loop):
        return None
    processes = loop.accelerator.num_processes
    try:
        ptx = getattr(loop.algorithm, "ptx", None)
        beside = ptx.examples if ptx else None
        load = found(loop.recipe, loop.data.train, loop.batches.row_tokens, processes, len(loop.data.eval), beside)
        return memory(setting(loop.recipe, device, processes), load=load)
    except Exception as error:  # a model may be of any kind, and a run is not to end because it cannot be planned
        loop.session.say(f"no plan can be made of this model ({first_line(error)})")
        return None


def told(loop: Loop, plan: Memory | None) -> list[str]:
    """The plan in a few lines."""
    return in_words(plan, loop.session.usage.device, loop.accelerator.num_processes) if plan else []


def held(loop: Loop, plan: Memory | None) -> str:
    """The measured peak beside the planned one, in one line; none without a plan, or where nothing was measured."""
    peak = loop.session.usage.peak
    return f"peak: {size(peak)} ({size(plan.peak.bytes)} were planned)" if plan and peak else ""


def outcome(loop: Loop, plan: Memory | None) -> dict[str, Any]:
    """For summary.json: the peak that was planned, and what was measured beside it."""
    return {
        "planned_peak_bytes": plan.peak.bytes if plan else None,
        "measured_peak_bytes": loop.session.usage.peak,
    }


def _small(loop: Loop) -> bool:
    return sum(p.numel() for p in loop.learner.model.parameters()) < SMALL
