"""How many examples the fuzz tests try: a quarter by default, all of them where there is time (ALIGN_FUZZ=4)."""

from __future__ import annotations

import os

import pytest

TIMES = int(os.environ.get("ALIGN_FUZZ", "1"))
REPEATS = int(os.environ.get("ALIGN_REPEATS", "1"))  # of races and kills at random moments, in the slow tests


at_length = pytest.mark.skipif(TIMES < 4, reason="takes many minutes: make test-all")


def often(examples: int) -> int:
    """Of so many examples, those that this run tries."""
    return max(1, examples * TIMES // 4)
