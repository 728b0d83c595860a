"""How often is tried what is random. Fuzz tests: a sixteenth of their examples by default, all of them where there is
time (ALIGN_FUZZ=8). Slow tests of races, kills and damage: some minutes, or a multiple of it (ALIGN_REPEATS=4)."""

from __future__ import annotations

import os

import pytest

TIMES = float(os.environ.get("ALIGN_FUZZ", "0.5"))
REPEATS = int(os.environ.get("ALIGN_REPEATS", "1"))


repeated = [pytest.mark.slow, pytest.mark.timeout(1800 * REPEATS)]
at_length = pytest.mark.skipif(TIMES < 8, reason="takes many minutes: make test-all")


def often(examples: int) -> int:
    """Of so many examples, those that this run tries."""
    return max(1, int(examples * TIMES / 8))
