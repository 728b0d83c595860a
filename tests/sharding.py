"""What tests of `train.shard: layers` share: runs on one process and on two, and whether they come to the same."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import several
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from world import Child, align, flat, lines, metrics, weights

LAYERS = "train.shard=layers"
FSDP = "ACCELERATE_USE_FSDP=true"


class Job(NamedTuple):
    """A run for two processes."""

    stage: str
    recipe: Path
    words: tuple[str, ...] = (LAYERS,)
    run: str = "two"

    @property
    def folder(self) -> Path:
        return self.recipe.parent / self.run

    def copied(self) -> Job:
        """The same with the whole trunk on both (DDP)."""
        return self._replace(words=(), run="copies")


def alone(job: Job, *words: str) -> Path:
    """The run of a job on this process alone, and its folder."""
    folder = job.recipe.parent / "one"
    told = align(job.recipe, f"run={folder}", *words, stage=importlib.import_module(f"align.{job.stage}"))
    assert told.status == 0, told.err
    return folder


def together(here: Path, jobs: list[Job]) -> list[int]:
    """All jobs on two processes, one after another; of each the bytes that a process held after its first step."""
    asked = [[job.stage, str(job.recipe), f"run={job.folder}", *job.words] for job in jobs]
    told = [child.wait() for child in Child.pair(here, 0, here, *map(json.dumps, asked), stage=several)]
    assert [one.status for one in told] == [0, 0], told[0].err + told[1].err
    assert (told[0].err, told[1].err) == ("", "")
    held = [[json.loads(line)["held"] for line in one.out.splitlines() if line.startswith('{"held')] for one in told]
    for job, said in zip(jobs, told[0].out.split('{"held'), strict=False):
        assert ("\nsharded: " in said) == (LAYERS in job.words or FSDP in job.words), said
    return [max(both) for both in zip(*held, strict=True)]


def assert_same(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Every number of metrics.jsonl, every weight, every sampled word."""
    ours, theirs = metrics(run), metrics(other)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for record, reference in zip(ours, theirs, strict=True):
        assert flat(record) == pytest.approx(flat(reference), rel=tolerance, abs=tolerance), record["step"]
    mine, known = weights(run), weights(other)
    assert mine.keys() == known.keys()
    for name, tensor in known.items():
        torch.testing.assert_close(mine[name], tensor, rtol=tolerance, atol=tolerance)
    assert lines(run / "samples.jsonl") == lines(other / "samples.jsonl")


def place(here: Path, name: str) -> Path:
    (here / name).mkdir()
    return here / name / "recipe.yaml"


def make_wide(world, folder: Path) -> str:
    """A Llama with tied embeddings of 2.7 million weights, beside which a small LoRA does not count."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
