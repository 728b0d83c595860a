"""Without `models/cpu` and `models/gpu` the program is slower, and every number is the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from often import at_length

ROOT = Path(__file__).parents[1]
FOLDERS = ("cpu", "gpu")
WITNESS = """
import sys
from pathlib import Path
import align

def pytest_sessionfinish():
    assert Path(align.__file__).parents[1] == Path(__file__).parent, align.__file__
    assert not [name for name in sys.modules if name.startswith(("align.models.cpu", "align.models.gpu"))]
"""
SMALL = [
    "tests/models/test_trunk.py::test_trees_give_what_padded_paths_give[llama-pairs-lora]",
    "tests/models/test_trunk.py::test_trees_give_what_padded_paths_give[gemma2-pairs-lora]",
    "tests/models/test_trunk.py::test_numbers_are_those_of_plain_transformers_and_peft[lora-qwen3]",
    "tests/models/test_roles.py::test_scores_are_those_of_plain_peft",
    "tests/models/sampling/test_decode.py::test_greedy_is_that_of_generate[llama]",
    "tests/test_oracle.py::test_assistant_turns[lora-llama]",
    "tests/test_preference_oracle.py::test_kto",
]
NUMERICAL = [
    "tests/objectives",
    "tests/data/test_trees.py",
    "tests/models",
    "tests/test_added_tokens.py",
    "tests/test_oracle.py",
    "tests/test_preference_oracle.py",
    "tests/test_dpo_truth.py",
    "tests/test_ppo_truth.py",
    "tests/test_processes.py",
    "tests/test_resume.py",
    "tests/test_sft.py",
    "tests/test_ppo.py",
    "tests/test_classify.py",
    "tests/test_evaluate.py",
    "tests/training/labelling",
    "tests/training/rollouts",
    "tests/training/test_reference.py",
    "tests/real/test_oracle_real.py",
    "tests/real/test_preference_oracle_real.py",
]


def without_folders(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """These tests on a copy of the package that lacks the folders."""
    shutil.copytree(ROOT / "align", folder / "align", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FOLDERS:
        shutil.rmtree(folder / "align" / "models" / name)
    (folder / "witness.py").write_text(WITNESS)
    ignored = [f"--ignore={ROOT / 'tests' / 'models' / name}" for name in FOLDERS]
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "witness"]
    return subprocess.run(
        [*map(str, command), "-p", "no:cacheprovider", *ignored, *(str(ROOT / test) for test in tests)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(SMALL, id="a few numbers", marks=pytest.mark.slow),
        pytest.param(NUMERICAL, id="all numbers", marks=[pytest.mark.slow, pytest.mark.timeout(900), at_length]),
    ],
)
def test_without_the_fast_folders_every_number_is_the_same(tests, tmp_path):
    done = without_folders(tmp_path, tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
