"""A run's files: JSON that any reader takes, on a disk that may be full, read with what a kill left of them."""

from __future__ import annotations

import json
import os
import re
import resource

import numpy as np
import pytest

from align.models.checkpoints.sources import base_folder
from align.recipe.errors import UserError
from align.recipe.schema import BaseRecipe, Batch, Data, Model, Source, Train
from align.training.plan import Plan
from align.training.runs.checkpoint import newest_checkpoint, save_checkpoint, tidy_checkpoints, trim_checkpoints
from align.training.runs.durable import write_atomic
from align.training.runs.identity import changes, read_identity
from align.training.runs.removal import OWN, run_recipe
from align.training.runs.run import Run


class Rows:
    """Six examples in their order."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(6)


def recipe_of(folder, per_step=4, **train) -> BaseRecipe:
    data = Data(train=[Source(path="x")])
    batch, section = Batch(examples=per_step), Train(**train)
    return BaseRecipe(stage="sft", run=str(folder), model=Model(base="x"), data=data, batch=batch, train=section)


def refused(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_lines_that_are_appended_come_back(tmp_path):
    run = Run(recipe_of(tmp_path))
    run.append("metrics.jsonl", {"step": 1, "split": "train", "loss": float("nan"), "said": "a\u2028b\x85c"})
    run.append("metrics.jsonl", {"step": 2, "split": "eval", "list": [float("inf"), 1.0]})
    for line in (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
        json.loads(line, parse_constant=refused)
    found = [{"step": 1, "split": "train", "loss": None, "said": "a\u2028b\x85c"}]
    found.append({"step": 2, "split": "eval", "list": [None, 1.0]})
    assert run.records("metrics.jsonl") == found
    raw = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(raw + '{"step": 3, "said": "ü'.encode()[:-1])  # inside a character
    said = []
    assert run.records("metrics.jsonl", said.append) == found
    assert said == [f"{tmp_path}/metrics.jsonl:3: the last line is torn; it is left out"]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"split": "train"}\n' + raw)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: it has no 'step' of type int; restore the file, or start"):
        run.records("metrics.jsonl")


def test_a_full_disk_is_told_with_its_place(tmp_path):
    run, before = Run(recipe_of(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    run.append("metrics.jsonl", {"step": 1, "split": "train"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/metrics.jsonl: cannot be written: File too large"):
            run.append("metrics.jsonl", {"step": 2, "split": "train", "loss": 1.2345})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record["step"] for record in run.records("metrics.jsonl")] == [1]


def test_what_a_kill_left_of_checkpoints_goes_and_a_whole_one_comes_back(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {}, {"step": step}, keep=9)
    (tmp_path / "step-000001").rename(tmp_path / ".old-step-000001")  # being deleted or replaced
    (tmp_path / "step-000002").rename(tmp_path / ".old-step-000002")
    (tmp_path / ".old-step-000002" / "state.json").unlink()
    (tmp_path / ".old-step-000003").mkdir()
    (tmp_path / ".writing-step-000005").mkdir()
    tidy_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003", "step-000004"]


def test_what_a_kill_before_the_old_ones_went_left_is_trimmed(tmp_path):
    for step in (5, 999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, {}, {"step": step}, keep=9)
    trim_checkpoints(tmp_path / "step-1000000", 2)  # the one behind it is damaged, say, and is written anew
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-1000001", "step-999999"]
    trim_checkpoints(tmp_path / "step-1000000", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-1000001"]


def test_a_plan_goes_on_behind_a_short_step():
    """Of 4 + 2 examples, extended to three epochs: the stream goes on with the first of the next."""
    short = Plan(recipe_of("x", epochs=1.0), Rows())
    assert (short.steps, short.place(1), short.place(2)) == (2, 4, 6)
    longer = Plan(recipe_of("x", epochs=3.0), Rows(), 2, short.place(2))
    assert longer.steps == 5
    assert [longer.batch(step).tolist() for step in (3, 4, 5)] == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]
    assert (longer.epoch(2), longer.epoch(5)) == (1.0, 3.0)
    again = Plan(recipe_of("x", epochs=3.0), Rows(), 4, longer.place(4))
    assert (again.steps, again.batch(5).tolist()) == (5, [2, 3, 4, 5])
    steps = Plan(recipe_of("x", steps=4), Rows(), 2, 6)
    assert (steps.steps, len(steps.batch(4)), steps.total) == (4, 4, 14)
    with pytest.raises(AssertionError):
        longer.batch(2)


@pytest.mark.parametrize(
    ("per_step", "train", "words"),
    [
        (4, {"epochs": 1.0}, "2 steps of 4 examples (the last of 2)"),
        (3, {"epochs": 1.0}, "2 steps of 3 examples"),
        (6, {"epochs": 1.0}, "1 step of 6 examples"),
        (16, {"steps": 3}, "3 steps of 16 examples: each of the 6 of an epoch 2.7 times a step"),
        (12, {"steps": 3}, "3 steps of 12 examples: each of the 6 of an epoch 2 times a step"),
        (16, {"epochs": 1.0}, "1 step of 6 examples"),
        (16, {"epochs": 5.0}, "2 steps of 16 examples (the last of 14): each of the 6 of an epoch 2.7 times a step"),
        (1, {"steps": 1}, "1 step of 1 example"),
    ],
)
def test_a_plan_in_words(per_step, train, words):
    assert Plan(recipe_of("x", per_step, **train), Rows()).shape == words


def side(examples, mark, **files):
    named = {name: {"examples": n, "bytes": size, "hash": own} for name, (n, size, own) in files.items()}
    return {"examples": examples, "hash": mark, "files": named}


def test_changes_are_told_by_what_they_come_from():
    here = {
        "sides": {"train": side(5, "a", x=(2, 20, "p"), y=(3, 30, "q")), "eval": side(1, "e", z=(1, 9, "r"))},
        "template": "t", "tokenizer": "k", "base": "b", "settings": "p", "results": {"model.adapter s": "1"},
    }  # fmt: skip
    assert changes(here, here) == []
    other = here | {"template": "u", "sides": here["sides"] | {"train": side(5, "b", x=(2, 20, "v"), y=(3, 30, "w"))}}
    assert changes(other, here) == ["the chat template has changed"]
    gone = here | {"sides": {"train": side(6, "c", x=(2, 21, "s"), v=(4, 4, "o"))}, "results": {}}
    assert changes(gone, here) == [
        "train: 6 examples there, 5 here, x has changed (21 bytes there, 20 here), no row of v here, no row of y there",
        "eval: 0 examples there, 1 here, no row of z there",
        "model.adapter s: its weights or its configuration have changed",
    ]
    settings = "the config.json of model.base, or what its generation_config.json says of ends, has changed"
    assert changes(here, here | {"settings": "q"}) == [settings]
    assert changes(here | {"base": "c", "tokenizer": "l"}, here) == [
        "the tokenizer has changed",
        "the weights of model.base have changed (fingerprint c there, b here)",
    ]


@pytest.mark.parametrize(
    ("found", "place"),
    [
        (5, "identity: "),
        ({}, "identity.sides: "),
        ({"sides": {"train": 5}}, "identity.sides.train: "),
        ({"sides": {"train": side(1, "a") | {"files": {"x": 1}}}}, "identity.sides.train.files.x: "),
        (
            dict.fromkeys(("template", "tokenizer", "base", "settings"), "t") | {"sides": {}, "results": [1]},
            "identity.results: ",
        ),
    ],
)
def test_a_damaged_identity_is_one_line(found, place):
    with pytest.raises(UserError, match=f"data.json does not say what the run was trained on .{place}") as error:
        read_identity(found, "data.json")
    assert len(error.value.problems) == 1


FILES = [name for name in OWN if "." in name]
PLACES = [(name, kind) for name in FILES for kind in ("pipe", "folder")] + [("metrics.jsonl", "device")]


@pytest.mark.parametrize(("name", "kind"), [*PLACES, ("checkpoints", "pipe"), ("final", "file")])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_no_file_is_neither_read_nor_removed(tmp_path, name, kind, fresh):
    """A named pipe would hold up the run for ever."""
    run, path = Run(recipe_of(tmp_path)), tmp_path / name
    write_atomic(tmp_path / "recipe.yaml", run_recipe(run.recipe))
    run.check(fresh=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "file":
            path.write_text("")
    before = path.lstat().st_ino
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*; move it away$"):
        run.check(fresh)
    if name in ("metrics.jsonl", "samples.jsonl"):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*; move it away$"):
            run.records(name)
    assert path.lstat().st_ino == before


def test_a_checkpoint_whose_manifest_is_a_pipe(tmp_path):
    save_checkpoint(tmp_path, 1, {}, {}, 2)
    path = save_checkpoint(tmp_path, 2, {}, {}, 2)
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    found, said = newest_checkpoint(tmp_path)
    assert (found.name, said) == ("step-000001", [f"{path} is passed over: manifest.json is no file in it."])


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "x.safetensors"])
def test_a_base_with_a_pipe_in_it(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        UserError, match=f"^model.base: {re.escape(str(tmp_path / name))} is no regular file; move it away$"
    ):
        base_folder(Model(base=str(tmp_path)))
