"""The launcher's configurations in accelerate_configs/: accelerate reads each, and starts what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from test_processes import assert_close, free_port
from world import WAIT, align

from align.training.launch import _asked

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "accelerate_configs"
SHOWN = ("README*.md", "docs/*.md", "Makefile", ".ci/run", "recipes/*.yaml", "accelerate_configs/*", "align/**/*.py")
# file -> processes, hosts, and which of accelerate's launchers
FILES = {
    "cpu_2": (2, 1, "use_cpu"),
    "gpu_1": (1, 1, None),
    "gpus_8_ddp": (8, 1, "multi_gpu"),
    "gpus_8_shard": (8, 1, "use_fsdp"),
    "hosts_2": (16, 2, "multi_gpu"),
    "deepspeed_zero2": (8, 1, "use_deepspeed"),
    "deepspeed_zero3": (8, 1, "use_deepspeed"),
}


def test_accelerate_reads_each():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(FILES)
    for name, (processes, hosts, launcher) in FILES.items():
        file = str(FOLDER / f"{name}.yaml")
        config = load_config_from_file(file)
        assert (config.num_processes, config.num_machines) == (processes, hosts)
        args = launch_command_parser().parse_args(["--config_file", file, "-m", "align.sft", "recipe.yaml"])
        args, defaults, _ = _validate_launch_command(args)
        assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, hosts, "no")
        chosen = {one for one in ("use_cpu", "multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, one)}
        assert chosen == ({launcher} if launcher else set())
        if name.startswith("deepspeed"):
            assert f"zero_stage: {defaults.deepspeed_config['zero_stage']}" == f"zero_stage: {name[-1]}"


def test_how_many_processes_the_launcher_was_told(tmp_path):
    """By a flag, in either spelling, or by a file, which a flag overrules."""
    file = ["--config_file", str(FOLDER / "cpu_2.yaml")]
    assert _asked(["accelerate", "launch", *file])["num_processes"] == 2
    assert _asked(["accelerate", "launch", *file, "--num_processes", "3"])["num_processes"] == 3
    assert _asked(["accelerate", "launch", "--cpu", "--num-processes", "4"])["num_processes"] == 4
    assert _asked(["accelerate", "launch", "--config-file", str(FOLDER / "hosts_2.yaml"), "--machine_rank", "1"]) == {
        "num_processes": 16, "num_machines": 2, "machine_rank": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_2", "gpus_8_shard"])
def test_a_run_by_a_configuration(name, world, here):
    """On a CPU: the one for it, and the one that shards, with two processes."""
    recipe = world.recipe(here / "recipe.yaml", batch={"examples": 5}, train={"steps": 4})
    assert align(recipe).status == 0
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    command += ["--main_process_port", str(free_port()), "--num_processes", "2"][: 2 if name == "cpu_2" else 4]
    command += ["-m", "align.sft", str(recipe), f"run={here / 'launched'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=env)
    assert told.returncode == 0, told.stderr
    assert "on 2 x cpu" in told.stdout
    assert ("sharded: " in told.stdout) == (name == "gpus_8_shard")
    assert_close(here / "launched", here / "run")


def test_every_command_that_is_shown_keeps_the_launcher_quiet():
    """Without -q, accelerate adds its own traceback to the line that says what a user can mend."""
    shown = 0
    for file in (file for pattern in SHOWN for file in ROOT.glob(pattern)):
        text = re.sub(r"\\\n#?", " ", file.read_text("utf-8"))
        for options in re.findall(r"accelerate launch (-.*?) -m ", text):
            args = launch_command_parser().parse_args([*shlex.split(options), "-m", "align.sft"])
            assert args.quiet, f"{file.relative_to(ROOT)}: accelerate launch {options}"
            shown += 1
        assert not re.search(r"accelerate launch -m", text), file
    assert shown > 80


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--cpu --num_processes 2 --main_process_port PORT"], ids=["one", "two"])
def test_behind_a_quiet_launcher_a_users_error_is_one_line(options, world, here):
    recipe = world.recipe(here / "recipe.yaml", data={"train": [{"path": "nowhere.jsonl"}]})
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]
    command += [*options.replace("PORT", str(free_port())).split(), "-m", "align.sft", str(recipe)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT, env=env)
    said = [line for line in told.stderr.splitlines() if "`" not in line]  # accelerate's own defaults
    assert (told.returncode, said) == (1, ["nowhere.jsonl: no such file or folder"])
