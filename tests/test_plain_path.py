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
BOTH, CPU = ("cpu", "gpu"), ("cpu",)
WITNESS = """
import sys
from pathlib import Path
import align
import pytest

@pytest.fixture(autouse=True)
def _only_the_plain_path():
    yield
    assert Path(align.__file__).parents[1] == Path(__file__).parent, align.__file__
    assert not {GONE} & sys.modules.keys()
"""
SMALL = [
    "tests/models/test_trunk.py::test_trees_give_what_padded_paths_give[llama-lora]",
    "tests/models/test_trunk.py::test_trees_give_what_padded_paths_give[gemma2-lora]",
    "tests/models/test_trunk.py::test_numbers_are_those_of_plain_transformers_and_peft[lora-qwen3]",
    "tests/models/test_roles.py::test_scores_are_those_of_plain_peft",
    "tests/models/sampling/test_decode.py::test_greedy_is_that_of_generate[llama]",
    "tests/test_oracle.py::test_assistant_turns[lora-llama]",
    "tests/test_preference_oracle.py::test_kto",
]
OF_GPU = [
    "tests/models/gpu/test_flex.py::test_what_a_gpu_is_offered",
    "tests/models/gpu/test_replay.py::test_replayed_steps_say_the_same[llama]",
]
# Every file whose tests compare what a model computes, but for those of the two folders' own, of what a plan says of
# them, and of what is quantised.
NUMERICAL = [
    "tests/objectives",
    "tests/data/test_trees.py",
    "tests/models",
    "tests/test_added_tokens.py",
    "tests/test_oracle.py",
    "tests/test_preference_oracle.py",
    "tests/test_grpo_oracle.py",
    "tests/test_dpo_truth.py",
    "tests/test_ppo_truth.py",
    "tests/test_grpo_truth.py",
    "tests/test_processes.py",
    "tests/test_shards.py",
    "tests/test_shard_moments.py",
    "tests/test_resume.py",
    "tests/test_ppo_resume.py",
    "tests/test_sampling_resume.py",
    "tests/test_going_on.py",
    "tests/test_sft.py",
    "tests/test_reward.py",
    "tests/test_dpo.py",
    "tests/test_kto.py",
    "tests/test_ppo.py",
    "tests/test_grpo.py",
    "tests/test_distill.py",
    "tests/test_classify.py",
    "tests/test_generated.py",
    "tests/test_evaluate.py",
    "tests/test_merge.py",
    "tests/tools/serving",
    "tests/tools/evaluation",
    "tests/training/answers",
    "tests/training/labelling",
    "tests/training/rollouts",
    "tests/training/test_meters.py",
    "tests/training/test_reference.py",
    "tests/real/test_oracle_real.py",
    "tests/real/test_preference_oracle_real.py",
]
SIDE_BY_SIDE = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]


def without(gone: tuple[str, ...], folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """These tests, as often as in the default run, on a copy of the package that lacks the folders."""
    shutil.copytree(ROOT / "align", folder / "align", ignore=shutil.ignore_patterns("__pycache__"))
    for name in gone:
        shutil.rmtree(folder / "align" / "models" / name)
    if gone == CPU:
        (folder / "align" / "models" / "cpu" / "__pycache__").mkdir(parents=True)  # as git leaves it
    names = {f"align.models.{name}" for name in gone}
    (folder / "witness.py").write_text(WITNESS.replace("{GONE}", repr(names)))
    ignored = [f"--ignore={ROOT / 'tests' / 'models' / name}" for name in BOTH if gone == BOTH]
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "witness"]
    command += ["-p", "no:cacheprovider", *ignored, *(SIDE_BY_SIDE if tests is NUMERICAL else ())]
    given = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_XDIST", "ALIGN_FUZZ"))}
    return subprocess.run(
        [*map(str, command), *(str(ROOT / test) for test in tests)],
        cwd=folder,
        env=given | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("gone", "tests"),
    [
        pytest.param(BOTH, SMALL, id="a few numbers", marks=pytest.mark.slow),
        pytest.param(CPU, OF_GPU, id="the other folder alone", marks=pytest.mark.slow),
        pytest.param(BOTH, NUMERICAL, id="all numbers", marks=[pytest.mark.slow, pytest.mark.timeout(1800), at_length]),
    ],
)
def test_without_the_fast_folders_every_number_is_the_same(gone, tests, tmp_path):
    done = without(gone, tmp_path, tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
