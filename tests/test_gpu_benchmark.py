"""benchmarks/gpu.py on a CPU: every part runs, and what is left out is named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "benchmarks"
OWN = ["published", "ppo", "sampling", "sft", "dpo", "reward", "checkpointing", "static"]


@pytest.fixture
def measured(monkeypatch, capsys):
    """Runs it; all lines but the last, and what that says."""
    monkeypatch.syspath_prepend(str(ROOT))
    before, alarm = set(ROOT.rglob("*")), signal.getsignal(signal.SIGALRM)

    def run(*options: object) -> tuple[list[str], dict]:
        import gpu

        monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", *map(str, options)])
        gpu.main()
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    yield run
    signal.signal(signal.SIGALRM, alarm)
    assert {path for path in ROOT.rglob("*") if "__pycache__" not in path.parts} <= before


@pytest.mark.slow
def test_every_part_gives_its_rows_and_a_rerun_goes_on(measured, tmp_path):
    record = tmp_path / "results" / "gpu.jsonl"
    lines, found = measured("--record", record, "--only", *OWN)
    rows = found["rows"]
    assert not found["missing"]
    assert [row["part"] for row in rows] == [
        "published", "ppo", *["sampling"] * 4, "sft", *["dpo"] * 2, *["reward"] * 2, "sft", *["sampling"] * 2,
    ]  # fmt: skip
    assert all(row["rate"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert {row["unit"] for row in rows} == {"tokens", "pairs", "episodes"}
    assert set(rows[1]["more"]) == {"sampling_seconds", "scoring_seconds", "epochs_seconds"}
    assert [set(row["more"]) for row in rows[7:11]] == [{"loss"}, {"loss", "times_padded"}] * 2
    assert sum(line.startswith("| ") and row["what"] in line for row in rows for line in lines) >= len(rows)

    kept = record.read_text().splitlines()
    assert len(kept) == len(OWN)
    record.write_text("\n".join(kept[:2] + kept[3:]) + "\n")  # as if it had been stopped in between
    lines, found = measured("--record", record, "--only", *OWN)
    assert sum("as the record has it" in line for line in lines) == len(OWN) - 1
    assert [row["what"] for row in found["rows"]] == [row["what"] for row in rows]
    assert [row["rate"] for row in found["rows"]][6:] == [row["rate"] for row in rows][6:]
    assert len(record.read_text().splitlines()) == len(OWN)


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named_and_not_recorded(measured, tmp_path):
    lines, found = measured("--only", "ppo", "dpo", "--seconds", "1", "--record", tmp_path / "gpu.jsonl")
    assert found["rows"] == []
    assert found["missing"] == {"ppo tiny": "out of time", "dpo tiny": "out of time"}
    assert "ppo tiny: not measured, out of time" in lines
    assert not (tmp_path / "gpu.jsonl").exists()


@pytest.mark.slow
def test_peers_give_their_rows_or_are_named():
    command = [sys.executable, str(ROOT / "gpu.py"), "--tiny", "--only", "trl", "grpo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    measured = [(row["part"], row["unit"]) for row in found["rows"]]
    assert measured == [("trl", "tokens"), ("grpo", "episodes")] or set(found["missing"].values()) == {
        "trl is not installed"
    }
