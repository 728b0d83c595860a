"""A plan as lines and as one JSON object."""

from __future__ import annotations

from typing import Any, NamedTuple

from align.tools.plan.advice import Change
from align.training.planning.memory import Memory, Moment
from align.training.planning.parts import Setting, host_bytes, trained
from align.training.planning.words import room, size
from align.training.planning.work import Work


class Report(NamedTuple):
    """All that a plan says."""

    at: Setting
    hosts: int
    plan: Memory
    work: Work
    changes: list[Change]
    mended: Memory  # the plan with the changes
    largest_row: int
    largest_rollout: int | None

    @property
    def have(self) -> int:
        """Bytes that a process may take."""
        return room(self.at.device, self.at.processes)

    @property
    def fits(self) -> bool:
        """As the recipe stands."""
        return self.plan.peak.bytes <= self.have


def told(report: Report) -> list[str]:
    """Lines for a reader."""
    at, plan, sizes = report.at, report.plan, report.at.skeleton.sizes
    many = f"{at.processes} x {at.device.name}" + (f" on {report.hosts} hosts" if report.hosts > 1 else "")
    lines = [
        f"{at.recipe.stage} of {at.recipe.model.base} on {many}: {sizes.weights / 1e6:,.1f} million weights, "
        f"{trained(at) / 1e6:,.1f} million train, {str(at.dtype).removeprefix('torch.')}",
        _load_line(report),
        "",
        f"memory of one device ({plan.peak.name}, the largest of {len(plan.moments)} moments):",
    ]
    for part in sorted(plan.peak.parts, key=lambda part: -part.bytes):
        if part.bytes:
            lines.append(f"  {size(part.bytes):>10}  {part.name}")
    verdict = "it fits" if report.fits else "it does NOT fit"
    lines.append(f"  {size(plan.peak.bytes):>10}  peak, of {size(report.have)}: {verdict}")
    lines.append("  " + "; ".join(f"{m.name} {size(m.bytes)}" for m in plan.moments if m is not plan.peak))
    if host := host_bytes(at, report.hosts):
        lines.append(f"  {size(host):>10}  of the host's own memory while its processes load the base")
    lines += ["", *_work_lines(report), "", *_limit_lines(report)]
    if report.changes:
        lines += ["", *_advice_lines(report)]
    return lines


def _load_line(report: Report) -> str:
    load, rows = report.plan.load, report.plan.load.rows
    said = f"a process computes rows of up to {load.row:,} tokens, {rows:,} before an update"
    if load.episodes:
        said += f"; it samples {load.episodes:,} responses of up to {load.answer:,} tokens"
    elif report.work.episodes:
        said += f"; a server draws responses of up to {load.answer:,} tokens, and its work is not counted"
    return said


def _work_lines(report: Report) -> list[str]:
    work = report.work
    said = f"a step: {work.tokens:,} tokens" + (f", {work.episodes:,} responses" if work.episodes else "")
    lines = [
        f"{said}, {work.flops / 1e12:,.3g} TFLOP" + (f", {size(work.sent)} sent by each device" if work.sent else "")
    ]
    if work.seconds is None:
        return [*lines, "its time is not known: name the device (--device) for a range"]
    low, high = work.seconds
    return [*lines, f"it takes between {low:,.3g} and {high:,.3g} seconds"]


def _limit_lines(report: Report) -> list[str]:
    lines = [f"the largest row that fits: {report.largest_row:,} tokens" if report.largest_row else "no row fits"]
    if report.largest_rollout is not None:
        most = f"{report.largest_rollout:,}" if report.largest_rollout else "none, even one by one"
        lines.append(f"the most responses that can be sampled at once: {most}")
    return lines


def _advice_lines(report: Report) -> list[str]:
    mended = report.mended.peak.bytes
    if mended > report.have:
        lines = [
            f"with all of these it still takes {size(mended)}; choose a smaller model, a larger device or more of them:"
        ]
    else:
        lines = [f"with these it takes {size(mended)}, and fits:"]
    return lines + [f"  {change.words:<36} {change.why}" for change in report.changes]


def record(report: Report) -> dict[str, Any]:
    """The same for a program; bytes, FLOPs and seconds."""
    at, plan, work = report.at, report.plan, report.work
    return {
        "stage": at.recipe.stage,
        "base": at.recipe.model.base,
        "device": {"name": at.device.name, "memory_bytes": report.have, "source": at.device.source},
        "processes": at.processes,
        "hosts": report.hosts,
        "weights": at.skeleton.sizes.weights,
        "trained": trained(at),
        "row_tokens": plan.load.row,
        "rows": plan.load.rows,
        "moments": [_moment(moment) for moment in plan.moments],
        "peak_bytes": plan.peak.bytes,
        "host_bytes": host_bytes(at, report.hosts),
        "fits": report.fits,
        "changes": {key: value for change in report.changes for key, value in change.keys.items()},
        "changed_peak_bytes": report.mended.peak.bytes,
        "tokens": work.tokens,
        "episodes": work.episodes,
        "flops": work.flops,
        "sent_bytes": work.sent,
        "seconds": work.seconds and list(work.seconds),
        "largest_row": report.largest_row,
        "largest_rollout": report.largest_rollout,
    }


def _moment(moment: Moment) -> dict[str, Any]:
    return {"name": moment.name, "bytes": moment.bytes, "parts": {part.name: part.bytes for part in moment.parts}}
