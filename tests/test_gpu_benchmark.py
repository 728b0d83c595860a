"""benchmarks/gpu.py on a CPU: every part runs, and what is left out is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measured(*options: str) -> tuple[list[str], dict]:
    """All lines but the last, and what that says."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def test_every_part_gives_its_rows():
    before = set((ROOT / "benchmarks").rglob("*.md"))
    lines, found = measured()
    rows = found["rows"]
    assert not found["missing"]
    assert [row["part"] for row in rows] == [
        "sft", *["sampling"] * 4, "ppo", *["dpo"] * 2, *["reward"] * 2, "sft", *["sampling"] * 2,
    ]  # fmt: skip
    assert all(row["rate"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert {row["unit"] for row in rows} == {"tokens", "pairs", "episodes"}
    assert set(rows[5]["more"]) == {"sampling_seconds", "scoring_seconds", "epochs_seconds"}
    assert [set(row["more"]) for row in rows[6:10]] == [{"loss"}, {"loss", "times_padded"}] * 2
    assert sum(line.startswith("| ") and row["what"] in line for row in rows for line in lines) >= len(rows)
    assert set((ROOT / "benchmarks").rglob("*.md")) == before


def test_what_there_is_no_time_for_is_named():
    lines, found = measured("--parts", "ppo", "dpo", "--seconds", "1")
    assert found["rows"] == []
    assert found["missing"] == {"ppo tiny": "out of time", "dpo tiny": "out of time"}
    assert "ppo tiny: not measured, out of time" in lines
