"""What a user can do wrong, and the one clear message for it: status 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from world import WAIT, align, talk, tree, write_rows

GOOD = json.dumps(talk("Hello", "Hi"))


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.fixture
def refused(world, here):
    """Run with `changes` to the recipe's text and overrides: its message, seen to be all that is left of it."""

    def run(*argv, change=("", ""), **sections):
        recipe = world.recipe(here / "recipe.yaml", **sections)
        text = recipe.read_text("utf-8")
        assert change[0] in text
        recipe.write_text(text.replace(*change, 1), encoding="utf-8")
        before = tree(here)
        told = align(recipe, *argv)
        assert told.status == 2, told.out
        assert "Traceback" not in told.out + told.err
        assert tree(here) == before, "a refused run must write nothing"
        return told.err.replace(f"{here}/", "").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("learning_rate", "learing_rate"),
            "recipe.yaml:20: unknown key 'learing_rate' in optim; did you mean 'learning_rate'?",
        ),
        (
            ("examples: 4", "examples: four"),
            "recipe.yaml:17: batch.examples: expected a whole number above 0, found the text 'four'",
        ),
        (
            ("stage: sft", "stage: dpo"),
            "recipe.yaml:1: this is a recipe of stage 'dpo'; run it with: "
            "accelerate launch -q -m align.dpo recipe.yaml",
        ),
        (("seed: 17", "seed: [17"), "recipe.yaml:4: this is not YAML: while parsing a flow sequence, "),
        (
            ("optim:", "optim: {}\noptim:"),
            "recipe.yaml:20: duplicate key 'optim' in the recipe; it already stands on line 19",
        ),
    ],
    ids=["mistyped key", "wrong type", "another stage", "not YAML", "twice"],
)
def test_a_fault_in_the_recipe(refused, change, message):
    assert refused(change=change).startswith(message)


def test_all_faults_of_a_recipe_at_once(refused):
    said = refused("optim.eps=-1", "trian.steps=3", change=("examples: 4", "example: 4"))
    assert [line.partition(": ")[0] for line in said.split("\n")] == [
        "recipe.yaml:17", "override 'optim.eps=-1'", "override 'trian.steps=3'",
    ]  # fmt: skip


def test_no_recipe(here):
    assert align("none.yaml") == (2, "", "none.yaml: no such recipe\n")
    assert "no recipe is named" in align().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows.jsonl: holds no rows"),
        ([GOOD, '{"messages": ['], "rows.jsonl:2: broken JSON at column "),
        (
            [GOOD, turns(("user", "Hello"))],
            "rows.jsonl:2: messages: expected an assistant turn to learn from, found none",
        ),
        (
            [turns(("user", "a"), ("tool", "b"), ("assistant", "c"))],
            "rows.jsonl:1: messages[1].role: this tool turn answers no call",
        ),
        (
            [turns(("user", "a"), ("assistant", ""))],
            "rows.jsonl:1: messages[1].content: expected text, found an empty text",
        ),
        (
            [turns(("user", "a"), ("assistant", None))],
            "rows.jsonl:1: messages[1].content: expected text, found nothing",
        ),
        (
            [turns(("user", "a"), ("asistant", "b"))],
            "rows.jsonl:1: messages[1].role: unknown role 'asistant'; did you mean 'assistant'?",
        ),
        (
            [GOOD, talk("Hello " * 300, "Hi")],
            "1 row longer than data.max_length = 256 tokens, the longest ",
        ),
        (['{"colour": "red"}'], "rows.jsonl"),
    ],
    ids=["empty file", "broken JSON", "no assistant", "no call", "empty", "null", "role", "overlong", "format"],
)
def test_a_fault_in_the_data(refused, here, rows, message):
    write_rows(here / "rows.jsonl", rows)
    said = refused(data={"train": [{"path": "rows.jsonl"}], "max_length": 256})
    assert said.startswith(message), said
    assert "rows.jsonl" in said


def test_a_set_that_filtering_empties(refused, here):
    write_rows(here / "rows.jsonl", [turns(("user", "a")), talk("Hello " * 300, "Hi")])
    data = {"train": [{"path": "rows.jsonl"}], "eval": {}, "max_length": 256, "overlong": "drop", "invalid": "drop"}
    assert refused(data=data).split("\n") == [
        "data.train: no row is left of 2 read; dropped: 1 invalid, 1 overlong",
        "rows.jsonl:1: messages: expected an assistant turn to learn from, found none",
        "rows.jsonl:2: more than 256 tokens",
    ]


def test_a_share_that_cannot_be_held_out(refused, here):
    write_rows(here / "rows.jsonl", [talk("Hello", "Hi"), talk("Hello", "Good day")])
    data = {"train": [{"path": "rows.jsonl"}], "eval": {"fraction": 0.5}}
    assert refused(data=data) == ("data.eval.fraction: all rows share one prompt, so none can be held out; set it to 0")


def test_a_data_file_that_is_missing(refused, world):
    near = str(world.talks).replace("talks", "talk")
    assert refused(f"data.train.0.path={near}") == f"{near}: no such file or folder; did you mean '{world.talks}'?"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./none", "model.base: there is no model './none'; expected a local folder"),
        ("nobody/nothing", "model.base: 'nobody/nothing' is neither a local folder nor could it be fetched"),
        ("demo/other", "model.base: "),
        (".", "model.base: . has no config.json, so it is no checkpoint; check the path"),
    ],
)
def test_an_unknown_model(refused, name, message):
    assert refused(f"model.base={name}").startswith(message)


def test_a_base_whose_weights_are_damaged(refused, world, here):
    base = shutil.copytree(world.base, here / "base")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1000])
    assert refused("model.base=base").startswith("model.base: base")


def test_a_chat_template_that_is_missing(refused):
    assert refused("model.chat_template=none.jinja").startswith("model.chat_template: ")


def test_modules_to_adapt_that_are_not_there(refused):
    said = refused("lora.targets=[q_prj]")
    assert said.startswith("lora.targets: ")
    assert "q_prj" in said


def test_an_adapter_of_another_trunk(world, refused, here):
    done = here / "done"
    assert align(world.recipe(here / "first.yaml", train={"steps": 1}), f"run={done}").status == 0
    assert align(here / "first.yaml", f"run={here / 'on_top'}", f"model.adapter={done / 'final'}").status == 0
    meta = json.loads((done / "final" / "align.json").read_text())
    (done / "final" / "align.json").write_text(json.dumps(meta | {"fingerprint": "0123456789abcdef"}))
    assert refused(f"model.adapter={done / 'final'}") == (
        f"model.adapter: done/final was trained on a trunk with fingerprint 0123456789abcdef ({world.base}), but this "
        f"trunk has {meta['fingerprint']} ({world.base}); use the base that it was trained on, {world.base}"
    )
    assert refused(f"model.adapter={done}").startswith("model.adapter: done has no ")
    assert refused("model.adapter=nowhere").startswith("model.adapter: nowhere has no ")


def test_a_tracker_that_is_not_installed(refused):
    assert refused("log.trackers=[wandb]") == "log.trackers: wandb is not installed; run: pip install wandb"


def test_a_run_folder_that_is_a_file(refused, here):
    (here / "notes").write_text("mine")
    assert refused("run=notes") == "run: notes is a file; name another folder"
    assert "notes" in refused("run=notes/run")
    (here / "old").symlink_to("gone")
    assert refused("run=old") == "run: old is a link to nothing; name another folder"


def test_a_folder_that_may_not_be_written(refused, here):
    """A read-only file system refuses root as well."""
    place = here / "place"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True).returncode:
        place.chmod(0o500)
        if os.access(place, os.W_OK):
            pytest.skip("nothing here can refuse this user")
    try:
        said = refused("run=place/run")
    finally:
        subprocess.run(["umount", str(place)], capture_output=True)
    assert said.startswith("run: 'place/run' cannot be a folder to write to (")
    assert "name another" in said


def test_a_cache_that_may_not_be_written(refused, here, monkeypatch):
    (here / "taken").write_text("a file")
    monkeypatch.setenv("ALIGN_CACHE", str(here / "taken"))
    assert "taken" in refused()


def test_processes_that_do_not_know_of_each_other(refused, monkeypatch):
    """A launcher for GPUs starts two on a machine without one: each would be a run of its own, in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused().startswith("2 processes were launched, but they do not find each other; ")


@pytest.mark.slow
def test_a_real_process_exits_with_two_and_says_one_line(world, here):
    recipe = world.recipe(here / "recipe.yaml")
    command = [sys.executable, "-m", "align.sft", str(recipe), "optim.learing_rate=1"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == (
        "override 'optim.learing_rate=1': unknown key 'learing_rate' in optim; did you mean 'learning_rate'?\n"
    )
