"""`~` and environment variables: expanded in every path of every recipe and command line, once, or refused by name."""

from __future__ import annotations

from typing import Annotated, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from world import align

from align import chat, pipeline, sft
from align.recipe.errors import UserError
from align.recipe.help import arms, sections
from align.recipe.paths import Location, expanded
from align.tools.pipeline.stage import KINDS, recipe_type
from align.training.labelling.predict import predict_command

PATHS = {"run", "path", "base", "adapter", "chat_template", "policy", "against", "baseline", "folder", "recipe"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", "sets/of mine")
    monkeypatch.setenv("NEAR", "~/near")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        ("~", "{home}"),
        ("~/a", "{home}/a"),
        ("$SETS/a", "sets/of mine/a"),
        ("${SETS}a", "sets/of minea"),
        ("$HOME/$SETS", "{home}/sets/of mine"),
        ("$NEAR/a", "{home}/near/a"),
        *((plain, plain) for plain in ("a~b", "./~", "a$", "$5", "$", "a b", "owner/name", "~nobody-here/a")),
    ],
)
def test_what_a_path_stands_for(home, written, whole):
    found = expanded(written)
    assert found == whole.format(home=home)
    assert expanded(found) == found
    assert TypeAdapter(Location).validate_python(written) == found


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("$NOWHERE/a", "the environment variable NOWHERE is not set, in '$NOWHERE/a'"),
        ("a/${NOWHERE}", "the environment variable NOWHERE is not set"),
        ("${HOME:-x}", "the environment variable HOME:-x is not set"),
        ("$DOLLAR", "'$DOLLAR' stands for '$HOME', which holds a variable itself"),
        ("a\0b", "holds a NUL character"),
        ("", "'' is empty, so it names no file"),
        (" \t", "is empty, so it names no file"),
        ("$ALIGN_TEST_EMPTY", "'$ALIGN_TEST_EMPTY' is empty, so it names no file"),
        ("a/" + "b" * 256, "is too long for the name of a file"),
        ("a/" * 2100, "is too long for the name of a file"),
        ("\ud800", "holds half a character"),
    ],
)
def test_what_is_no_path(home, monkeypatch, written, said):
    monkeypatch.setenv("DOLLAR", "$HOME")
    monkeypatch.setenv("ALIGN_TEST_EMPTY", "")
    with pytest.raises(UserError) as error:
        expanded(written)
    assert said in str(error.value)
    assert len(str(error.value)) < 250


def test_a_recipe_cannot_hold_a_name_that_is_not_utf8(home):
    """Though a command line can."""
    assert expanded("a\udcff") == "a\udcff"
    with pytest.raises(ValidationError, match="not UTF-8"):
        TypeAdapter(Location).validate_python("a\udcff")


@given(
    st.text(max_size=12) | st.lists(st.sampled_from(["~", "/", "$", "{", "}", "SETS", "a"]), max_size=8).map("".join)
)
def test_expanding_twice_changes_nothing(path):
    try:
        once = expanded(path)
    except UserError:
        return
    assert expanded(once) == once


def test_every_path_of_every_recipe_is_expanded():
    found = set()
    for kind in (*map(recipe_type, KINDS), pipeline.Recipe, pipeline.Keys, pipeline.Accelerate):
        for _, section in sections(kind):
            for name, field in section.model_fields.items():
                texts = [arm for arm in arms(field.rebuild_annotation()) if _text(arm)]
                if name in PATHS and texts:
                    found.add(name)
                    assert all("AfterValidator" in str(arm) for arm in texts), (section.__name__, name)
    assert found == PATHS


def _text(kind) -> bool:
    """Whether it is text, or a list of texts."""
    inner = get_args(kind)[0] if get_origin(kind) in (list, Annotated) else kind
    return inner is str or (inner is not kind and _text(inner))


def test_a_run_is_the_same_however_its_paths_are_written(world, here, home, monkeypatch):
    monkeypatch.setenv("WORLD", str(world.folder))
    recipe = world.recipe(
        home / "recipe.yaml",
        run="~/run",
        model={"base": "$WORLD/base"},
        data={"train": [{"path": "${WORLD}/talks.jsonl"}], "eval": {"sources": []}},
        train={"steps": 1, "eval_every": None},
    )
    told = align("~/recipe.yaml")
    assert told.status == 0, told.err
    assert (home / "run" / "final").is_dir()
    assert f"path: {world.talks}" in (home / "run" / "recipe.yaml").read_text("utf-8")
    monkeypatch.delenv("WORLD")
    told = align(recipe)
    assert told.status == 2
    assert [line.partition(": the environment")[2] for line in told.err.splitlines()] == [
        " variable WORLD is not set, in '$WORLD/base'",
        " variable WORLD is not set, in '${WORLD}/talks.jsonl'",
    ]
    again = align(recipe, f"model.base={world.base}", f"data.train.0.path={world.talks}", f"run={home / 'run'}")
    assert "nothing to do" in again.out, again
    assert "nothing to do" in align("$HOME/run/recipe.yaml").out


def test_paths_of_the_other_commands(world, here, home, capsys):
    """A pipeline's own and its stages' (`${name}` stays a stage there), and those of chat and --predict."""
    world.recipe(here / "sft.yaml", run="unused")
    (here / "pipe.yaml").write_text(
        "stage: pipeline\nrun: ~/all\naccelerate: null\nstages:\n"
        "  sft: {recipe: $HOME/sft.yaml, run: ~/one, data: {train: [{path: $HOME/nothing.jsonl}]}}\n"
    )
    told = align("~/pipe.yaml", "--dry-run", stage=pipeline)
    assert f"{home}/nothing.jsonl: no such file" in told.err
    told = align("~/pipe.yaml", "--dry-run", f"stages.sft.data.train.0.path={world.talks}", stage=pipeline)
    assert told.status == 0, told.err
    assert f"run: {home}/one" in told.out
    told = align("~/pipe.yaml", "--dry-run", "stages.sft.data.train.0.path=${HOME}/x", stage=pipeline)
    assert "no stage is named 'HOME'" in told.err
    assert "an environment variable is written $HOME" in told.err
    for words in (["~/$NOWHERE"], ["~/none", "--adapter", "$NOWHERE"]):
        assert "variable NOWHERE is not set" in align(*words, stage=chat).err
    with pytest.raises(SystemExit):
        predict_command(["--predict", "~/none", "$NOWHERE"])
    assert "variable NOWHERE is not set" in capsys.readouterr().err
    assert "variable NOWHERE is not set" in align("$NOWHERE/a.yaml", stage=sft).err
