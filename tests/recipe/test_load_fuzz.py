"""Whatever a file holds, loading it gives a recipe or a UserError that names the file; a dump loads back."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from often import often

from align.recipe.errors import UserError, brief
from align.recipe.load import dump_recipe, load_recipe
from align.recipe.schema import BaseRecipe, Data, Log, Lora, Model, Optim, Source


class Recipe(BaseRecipe):
    """A stage for the tests."""

    stage: Literal["sft"]


TREE = {
    "stage": "sft",
    "run": "r",
    "model": {"base": "b", "chat_template": "plain"},
    "lora": {"r": 4, "targets": ["q"]},
    "data": {"train": [{"path": "a", "columns": {"prompt": "q"}}], "eval": {"fraction": 0.1}},
    "optim": {"learning_rate": 5e-7},
    "batch": {"row_tokens": "auto"},
}
TEXT = yaml.safe_dump(TREE, sort_keys=False).encode()
FUZZ = settings(
    max_examples=often(700),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

words = st.sampled_from(["path", "train", "r", "lr", "targets", "0", "yes", "1e-4", "sft", "dpo", "auto", "", "~"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.text(max_size=8)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=6)
lines = st.sampled_from([
    b"<<: *a\n", b"a: &a [*a, *a]\n", b"  - ", b"? [x]\n: y\n", b"!!int x", b"--- |\n", b"%YAML 9.9\n", b"'",
    b'"\\', b"{" * 99, b"- " * 99, b": : :", b"\t", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x00", b"&a", b"*a",
    b'"\\ud800"', b'? "\\ud800"\n', b'"\\UFFFFFFFF"', b"run: 1_0\n", b"seed: " + b"9" * 5000 + b"\n", b"=",
    b"stage: dpo\n", b"stage: [sft]\n", b"data: *x", b"seed: 1e999\n", b"seed: 1" + b"0" * 400 + b"\n",
])  # fmt: skip


def spots(tree, at=()):
    """The path of every value in a tree."""
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from spots(child, (*at, key))


@st.composite
def mutated_trees(draw):
    """The valid recipe with a few values dropped, replaced, renamed or copied to other places."""
    tree = copy.deepcopy(TREE)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(list(spots(tree))[1:] or [("run",)]))
        inside = tree
        for key in above:
            inside = inside[key]
        old = inside.pop(last) if not isinstance(inside, dict) or last in inside else None
        new = {"drop": None, "rename": old, "replace": draw(values)}
        action = draw(st.sampled_from(sorted(new)))
        if action != "drop" and isinstance(inside, list):
            inside.insert(last, new[action])
        elif action != "drop":
            inside[draw(words) if action == "rename" else last] = new[action]
    return json.dumps(tree, indent=1).encode()


@st.composite
def mutated_text(draw):
    """The valid recipe's text, cut, with bytes or lines put in or taken out."""
    text = TEXT
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 20)) | st.just(len(text)))
        text = text[:start] + draw(lines | st.binary(max_size=6) | st.just(text[start:end] * 2)) + text[end:]
    return text


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "some.yaml"


def load_or_hear_why(file: Path, content: bytes, *overrides: str) -> Recipe | None:
    file.write_bytes(content)
    try:
        return load_recipe(file, overrides, Recipe)
    except UserError as error:
        for problem in error.problems:
            assert problem.startswith(f"{file}:") or any(
                problem.startswith(f"override {brief(o)!r}: ") for o in overrides
            )
            assert "\n" not in problem
            problem.encode()
    return None


@FUZZ
@given(content=mutated_trees())
def test_any_structure(file, content):
    load_or_hear_why(file, content)


@FUZZ
@given(content=mutated_text() | st.binary(max_size=40))
def test_any_bytes(file, content):
    load_or_hear_why(file, content)


KEYS = ["data", "train", "0", "1", "lora", "targets", "path", "run", "x", ""]
dotted = st.lists(st.sampled_from(KEYS), max_size=4).map(".".join)
written = st.text(max_size=12) | values.map(json.dumps) | st.sampled_from(["[", "*a", "!x", '"\\ud800"', "\udcff"])


@FUZZ
@given(override=st.builds("{}={}".format, dotted, written) | st.text(max_size=12))
def test_any_override(file, override):
    load_or_hear_why(file, TEXT, override)


def holds(value) -> bool:
    """Whether a recipe can hold it: numbers are finite and of ordinary length."""
    if isinstance(value, list | dict):
        return all(map(holds, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or (math.isfinite(value) and (value != int(value) or abs(value) < 1e17))


text = words | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
lined = st.lists(text | st.sampled_from(["", " ", "#", "-", "a: b"]), max_size=4).map("\n".join)
positive = st.floats(min_value=0, exclude_min=True, max_value=1e300)
paths = text.filter(lambda path: path.strip() and "\0" not in path and "$" not in path)
sources = st.builds(Source, path=paths, columns=st.dictionaries(text, text, max_size=2))


def recipes_of(model, lora):
    return st.builds(
        Recipe,
        stage=st.just("sft"),
        run=paths,
        seed=st.integers(0, 2**32 - 1),
        model=model,
        lora=lora,
        data=st.builds(Data, train=st.lists(sources, min_size=1, max_size=2)),
        optim=st.builds(Optim, learning_rate=positive, eps=positive),
        log=st.builds(Log, samples=st.lists(lined, max_size=3)),
    )


configs = st.dictionaries(text, values.filter(holds), max_size=3)
adapters = st.none() | st.builds(Lora, targets=st.just("all-linear") | st.lists(text, max_size=3))
recipes = recipes_of(st.builds(Model, base=paths), adapters) | recipes_of(
    st.builds(Model, base=paths, init=st.just("random"), config=configs), st.none()
)


@settings(FUZZ, max_examples=often(400))
@given(recipe=recipes)
def test_a_dump_loads_back_equal(file, recipe):
    file.write_bytes(dump_recipe(recipe).encode())
    assert load_recipe(file, [], Recipe) == recipe
