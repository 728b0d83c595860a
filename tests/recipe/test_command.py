"""The command line, its help and its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from align.recipe.errors import UserError
from align.recipe.load import json_schema, parse_command, recipe_help
from align.recipe.schema import BaseRecipe

USAGE = "usage: accelerate launch -q -m align.sft RECIPE [key.path=value ...] [--fresh] [--extend] [--show]"


class Recipe(BaseRecipe):
    """LoRA fine-tuning on conversations."""

    stage: Literal["sft"]


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    text = "stage: sft\nrun: r\nmodel: {base: b}\ndata: {train: [{path: p}]}\n"
    (tmp_path / "a=b" / "r.yaml").write_text(text)
    return "./a=b/r.yaml"


def test_flags_and_overrides_in_any_order(file):
    command = parse_command(["--show", "seed=3", file, "run=x", "--fresh"], Recipe, "align.sft")
    assert (command.path, command.fresh, command.show) == (Path(file), True, True)
    assert (command.recipe.seed, command.recipe.run) == (3, "x")
    command = parse_command([file], Recipe, "align.sft")
    assert (command.fresh, command.show) == (False, False)


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ([], ["no recipe is named"]),
        (["run=x"], ["no recipe is named"]),
        (["a.yaml", "--fersh", "b"], ["unknown option '--fersh'; did you mean '--fresh'?",
                                      "'b' is one argument too many; an override is key.path=value"]),
        (["a.yaml", "--optim.eps=1e-4"], ["unknown option '--optim.eps=1e-4'; an override is written without "
                                          "dashes: optim.eps=1e-4"]),
        (["a.yaml", "--optim.eps"], ["unknown option '--optim.eps'; an override is written without dashes: "
                                     "optim.eps=value"]),
        (["a.yaml", "--fresh", "--extend"], ["--fresh starts over and --extend goes on: give one of them"]),
        (["a.yaml", "-x"], ["unknown option '-x'"]),
    ],
)  # fmt: skip
def test_a_wrong_command_line(words, problems):
    with pytest.raises(UserError) as caught:
        parse_command(words, Recipe, "align.sft")
    assert caught.value.problems == (*problems, USAGE)


@pytest.mark.parametrize(("flag", "made"), [("--help", recipe_help), ("--schema", json_schema)])
def test_help_and_schema_print_and_exit(capsys, flag, made):
    with pytest.raises(SystemExit) as caught:
        parse_command(["nowhere.yaml", flag], Recipe, "align.sft")
    assert caught.value.code == 0
    assert capsys.readouterr().out == (made(Recipe, "align.sft") if flag == "--help" else made(Recipe))


def test_help_tells_every_key_with_type_default_and_description():
    text = recipe_help(Recipe, "align.sft")
    assert text.startswith(f"{USAGE}\n\nLoRA fine-tuning on conversations.\n")
    assert max(map(len, text.splitlines())) <= 100
    for entry in (
        "  stage: 'sft', required\n",
        "  seed: a whole number at least 0 and below 4294967296, default 0\n      Fixes the order",
        "optim: AdamW (Loshchilov & Hutter 2019",
        "  optim.learning_rate: a number above 0, default 0.0002\n      Peak learning rate.\n",
        "  batch.row_tokens: a whole number above 0 or 'auto', default auto\n",
        "  data.train.0.path: text, required\n",
        "  lora.targets: a list (each item text) or 'all-linear', default all-linear\n",
        "  train.steps: a whole number above 0 or null, default null\n",
        "\ndata.eval.sources.0: the same keys as data.train.0\n",
    ):
        assert entry in text


def test_the_schema_is_strict_and_described():
    schema = json.loads(json_schema(Recipe))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["stage", "run", "model", "data"]
    assert all(part["additionalProperties"] is False for part in [schema, *schema["$defs"].values()])
    assert schema["$defs"]["Optim"]["properties"]["learning_rate"]["description"] == "Peak learning rate."
