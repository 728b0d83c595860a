"""A command that the tests start in two processes: `align.sft`, planned, where the second has next to no memory."""

from __future__ import annotations

import os
from pathlib import Path

from align import sft
from align.models import memory
from align.training.planning import forecast


def main(argv: list[str]) -> None:
    """A folder that is taken for the second process's control group, then the stage's words."""
    folder, *words = argv
    forecast.SMALL = 0
    if os.environ["RANK"] == "1":
        memory.CGROUP = Path(folder)
    sft.main(words)
