"""Numbers as a comparison tells them."""

from __future__ import annotations

import math

from align.training.bootstrap import Estimate
from align.training.report.plots import percent

KLS = {"full": "over the full vocabulary", "sequence": "the sequence estimate"}


def number(x: float) -> str:
    """Three digits, or all of an integer's, with a true minus sign; a dash where it is not known."""
    if not math.isfinite(x):
        return "–"
    return (f"{x:.3g}" if abs(x) < 999.5 else f"{x:,.0f}").replace("-", "−")


def ranged(e: Estimate) -> str:
    """1.2 (1.1 to 1.3)."""
    return f"{number(e.value)} ({number(e.low)} to {number(e.high)})" if math.isfinite(e.low) else number(e.value)


def rate(e: Estimate) -> str:
    """62.0 % (55.1 to 69.2)."""
    if not math.isfinite(e.value):
        return "–"
    return percent(e.value) + (f" ({100 * e.low:.1f} to {100 * e.high:.1f})" if math.isfinite(e.low) else "")
