"""A plan in words."""

from __future__ import annotations

from align.training.planning.devices import Device
from align.training.planning.memory import Memory

MOST_PARTS = 5


def size(count: float) -> str:
    """Bytes as GB or MB, of 10^9 and 10^6 bytes."""
    if count >= 1e8:
        return f"{count / 1e9:,.1f} GB" if count >= 1e10 else f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB"


def room(device: Device, processes: int) -> int:
    """Bytes that each process may have: those on a CPU share one memory."""
    return device.memory // (processes if device.type == "cpu" else 1)


def in_words(plan: Memory, device: Device, processes: int) -> list[str]:
    """A line for the peak, and one for what it is made of."""
    peak, have = plan.peak, room(device, processes)
    each = " a process" if processes > 1 else ""
    verdict = "it fits" if peak.bytes <= have else "it does NOT fit: python -m align.plan RECIPE names what to change"
    parts = sorted(peak.parts, key=lambda part: -part.bytes)[:MOST_PARTS]
    return [
        f"plan: a peak of {size(peak.bytes)}{each} ({peak.name}), {size(have)} are free: {verdict}",
        "      " + ", ".join(f"{part.name} {size(part.bytes)}" for part in parts if part.bytes),
    ]
