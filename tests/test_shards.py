"""`train.shard: layers` changes nothing but where weights lie: two processes come to the numbers of one alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_start import make_start, recipe_of
from samplers import make_teacher
from samplers import recipe_of as sampling
from sharding import FSDP, LAYERS, Job, alone, assert_same, make_wide, place, together
from test_classify import ROWS, predicted
from test_classify import recipe as classes
from test_processes import free_port
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
)
from world import align

from align import distill, dpo, grpo, reward

STEPS = {"train": {"steps": 2, "eval_every": 1, "save_every": 1}}
STEADY = {"optim": {"learning_rate": 0.005, "schedule": "constant", "warmup": 0}}
GENTLE = {"optim": {"learning_rate": 0.0005, "warmup": 0}}  # every weight trains
SAYS = {"log": {"trackers": [], "samples": ["Name the capital of Peru"], "sample_tokens": 8}}
# What a process with a shard may hold of the bytes of one with a copy. A frozen copy that lay whole would be 0.6.
MOST = {"whole": 0.6, "copied": 0.55, "kto": 0.35, "scores": 0.35}

SHARDED = ("bfloat16", "recomputed", "from a")  # of `every_stage`, those that say nothing new of whole copies


@pytest.fixture(scope="module")
def start(world, cache, tmp_path_factory):
    return make_start(world, cache, tmp_path_factory)


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory):
    return make_wide(world, tmp_path_factory.mktemp("wide"))


def ppo_recipe(world, start, path: Path, **ppo: Any) -> Path:
    """One prompt a step, so that of two processes one has nothing to sample; language modelling beside it."""
    ptx = {"sources": [{"path": str(world.talks)}], "examples": 3}
    more = {"ptx": ptx, "epochs": 2, "minibatches": 1} | ppo
    return recipe_of(world, start, path, ppo=more, batch={"examples": 1, "row_tokens": 128}, **STEPS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_go_from_one_process_to_shards_to_copies_and_back(world, wide, here, monkeypatch):
    """Of a LoRA and of all weights, with AdamW's moments; beside shards a process holds little more than half."""
    monkeypatch.setattr("world.WAIT", 400)
    model = {"model": {"base": wide, "dtype": "float32"}} | SAYS
    every = {"lora": None, "optim": GENTLE["optim"] | {"schedule": "constant"}}
    jobs = [
        Job("sft", world.recipe(place(here, "lora"), **model, lora={"r": 2}, **STEADY, **STEPS)),
        Job("sft", world.recipe(place(here, "whole"), **model, **every, **STEPS), (FSDP,)),
    ]

    def until(step: int) -> tuple[str, ...]:
        return f"train.steps={step}", "--extend"

    turns = []
    for job in jobs:
        begun = job.copied()._replace(run="begun")
        alone(job, "train.steps=1")
        shutil.copytree(job.recipe.parent / "one", job.folder)
        alone(job, *until(2))
        shutil.copytree(job.recipe.parent / "one", begun.folder)
        turns += [job._replace(words=(*job.words, *until(2))), begun._replace(words=until(3))]
        turns += [job._replace(words=until(3)), job._replace(words=(LAYERS, *until(4)))]
    held = together(here, turns)
    for job in jobs:
        for step in (3, 4, 5):
            known = alone(job, *until(step))
        for run, steps in (("two", (5,)), ("begun", (4, 5))):
            for step in steps:
                told = align(job.recipe, f"run={job.recipe.parent / run}", *until(step))
                assert told.status == 0, told.err
            assert_same(job.recipe.parent / run, known)
        shards, _, copies, again = held[:4]
        assert max(shards, again) <= 0.6 * copies, held
        held = held[4:]


def test_what_a_launcher_asks_for(world, here, monkeypatch):
    recipe = world.recipe(here / "recipe.yaml", train={"steps": 1, "eval_every": None})
    name, value = FSDP.split("=")
    monkeypatch.setenv(name, value)
    told = align(recipe)
    assert told.status == 0, told.err
    assert "train.shard: layers has nothing to do: there is one process" in told.out
    assert name not in os.environ
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    told = align(recipe, "--fresh")
    assert told.status == 2
    assert "fsdp_offload_params" in told.err


def every_stage(world, wide, here: Path) -> dict[str, Job]:
    """By name."""
    small, more = {"base": str(world.base), "dtype": "float32"}, STEPS["train"]
    made: dict[str, Job] = {}

    def add(stage: str, name: str, make, **sections: Any) -> None:
        os.chdir(place(here, name).parent)
        made[name] = Job(stage, make(here / name / "recipe.yaml", **STEPS | sections))

    def heavy(held: Path) -> dict[str, Any]:
        """Beside such weights a LoRA does not count; few rows, for they are slow."""
        few = {"batch": {"examples": 2}, "data": {"eval": {"sources": [{"path": str(held), "limit": 2}]}}}
        return {"model": small | {"base": wide}, "lora": {"r": 2}} | few | GENTLE

    def preferences(module):
        return lambda path, **sections: world.preferences(path, module, **sections)

    def labelled(path, **sections):
        return classes(world, path, data={"train": [{"path": str(path.parent / "rows.jsonl")}]}, **sections)

    add("sft", "whole", world.recipe, model=small | {"base": wide}, lora=None, **GENTLE)
    add("sft", "recomputed", world.recipe, model=small | {"gradient_checkpointing": True})
    add("sft", "padded", world.recipe, model=small | {"layout": "padded"}, **SAYS)
    add("sft", "dora", world.recipe, lora={"r": 4, "dora": True})
    add("sft", "tokens", world.recipe, model=small | {"add_tokens": ["<|new|>"]})
    add("dpo", "pairs", preferences(dpo))
    add("dpo", "copied", preferences(dpo), **heavy(world.held_pairs) | {"lora": None})
    add("dpo", "cached", preferences(dpo), dpo={"reference": "cached"})
    add("dpo", "kto", preferences(dpo), **heavy(world.held_verdicts), dpo={"loss": "kto"})
    add("dpo", "kto copied", preferences(dpo), lora=None, dpo={"loss": "kto"}, **GENTLE)
    four = {"batch": {"examples": 4}}  # of fewer, a gradient is so small that AdamW makes its rounding large
    add("reward", "scores", preferences(reward), **heavy(world.held_pairs) | four)
    add("reward", "all scores", preferences(reward), lora=None, **GENTLE)
    add("classify", "classes", labelled)
    add("classify", "blocks", labelled, lora=None, classify={"train": "last_blocks"})
    add("classify", "both directions", labelled, model={"base": str(bert(here)), "dtype": "float32"})
    add("classify", "head", labelled, lora=None, classify={"train": "head"})
    rounded = {"base": wide, "dtype": "bfloat16", "gradient_checkpointing": True}
    add("sft", "bfloat16, all weights", world.recipe, model=rounded, lora=None, **GENTLE)
    add("sft", "bfloat16", world.recipe, model={"base": wide, "dtype": "bfloat16"})
    add("reward", "bfloat16 scores", preferences(reward), model={"base": wide, "dtype": "bfloat16"}, **GENTLE)
    for name, start in (("from a checkpoint", "one"), ("from a result", "one/final")):
        folder = here / "whole" / start
        add(
            "sft",
            name,
            world.recipe,
            model=small | {"base": wide},
            lora=None,
            **GENTLE,
            train=more | {"start_from": str(folder)},
        )
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stages", [("reward", "classify"), ("sft",), ("dpo",)], ids=", ".join)
def test_every_stage(world, wide, here, monkeypatch, stages):
    """With a LoRA, without one, with all that a recipe may ask for besides; in shards, and as whole copies."""
    monkeypatch.setattr("world.WAIT", 900)
    jobs = {name: job for name, job in every_stage(world, wide, here).items() if job.stage in stages}
    known = {name: alone(job) for name, job in jobs.items()}
    copied = {name: job.copied() for name, job in jobs.items() if not name.startswith(SHARDED)}
    held = together(here, [*jobs.values(), *copied.values()])
    for name, job in jobs.items():
        assert_same(job.folder, known[name], 3e-2 if "bfloat16" in name else 1e-5)
    for name, job in copied.items():
        assert_same(job.folder, known[name])
    if "classify" in stages:
        labelled_alike(here, jobs["classes"].folder / "final", known["classes"] / "final")
    shards, copies = dict(zip(jobs, held, strict=False)), dict(zip(copied, held[len(jobs) :], strict=True))
    assert all(shards[name] <= MOST[name] * copies[name] for name in MOST.keys() & jobs.keys()), (shards, copies)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_that_sample(world, start, cache, here, monkeypatch):
    """One prompt a step, so that of two processes one has nothing to sample."""
    monkeypatch.setattr("world.WAIT", 400)
    other = {"base": str(start.base), "adapter": str(make_teacher(world, start, cache))}
    one = {"batch": {"examples": 1, "row_tokens": 128}} | STEPS
    jobs = [
        Job("ppo", ppo_recipe(world, start, place(here, "ppo"))),
        Job("grpo", sampling(world, start, place(here, "grpo"), grpo, **one)),
        Job("distill", sampling(world, start, place(here, "distill"), distill, {"on_policy": 1}, **one)),
        Job("distill", sampling(world, start, place(here, "other"), distill, {"teacher": other}, **one)),
    ]
    known = [alone(job) for job in jobs]
    together(here, [*jobs, *(job.copied() for job in jobs)])
    for job, reference in zip(jobs, known, strict=True):
        assert_same(job.folder, reference)
        assert_same(job.copied().folder, reference)


def labelled_alike(here: Path, *finals: Path) -> None:
    """By `--predict`."""
    (here / "texts.txt").write_text("Name the city 3\nSay the capital 7\n")
    ours, theirs = (predicted(final, str(here / "texts.txt")) for final in finals)
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    shares = [[float(row["p_spam"]) for row in rows] for rows in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-4)


def bert(here: Path) -> Path:
    """An encoder of two layers that knows the words of the texts."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for row in ROWS for w in row["text"].lower().split()}),
    ]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(here / "bert")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(here / "bert")
    return here / "bert"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_launcher_configured_for_fsdp(world, here):
    """As `accelerate config` writes it."""
    recipe = world.recipe(here / "recipe.yaml", **STEPS)
    (here / "fsdp.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: 'no'\nmachine_rank: 0\n"
        "num_machines: 1\nnum_processes: 2\nrdzv_backend: static\nsame_network: true\nuse_cpu: false\n"
        "fsdp_config:\n  fsdp_version: 2\n  fsdp_offload_params: false\n  fsdp_cpu_ram_efficient_loading: true\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "fsdp.yaml"]
    command += ["--main_process_port", str(free_port()), "-m", "align.sft", str(recipe), f"run={here / 'two'}"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("sharded: ") == 1
    assert align(recipe).status == 0
    assert_same(here / "two", here / "run")
