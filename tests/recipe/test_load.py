"""Each kind of mistake in a recipe gives one plain line that names its place; all of them come at once."""

from __future__ import annotations

import time
from itertools import pairwise
from textwrap import dedent
from typing import Literal

import pytest

from align.recipe.errors import UserError
from align.recipe.load import dump_recipe, load_recipe
from align.recipe.schema import BaseRecipe, Lora, Section


class Beta(Section):
    """What the stage adds."""

    beta: float = 0.1
    """Strength."""
    start: Lora | Literal["auto"] | None = "auto"
    """A union with a section in it."""


class Recipe(BaseRecipe):
    """A stage for the tests."""

    stage: Literal["sft"]
    sft: Beta = Beta()


VALID = """\
stage: sft
run: runs/x
model: {base: demo/tiny}
data:
  train:
    - path: a.jsonl
optim:
  learning_rate: 5e-7
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a recipe text, standing in `r.yaml`."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
        return load_recipe("r.yaml", overrides, Recipe)

    return load


@pytest.fixture
def problems(load):
    """The lines of the error that a recipe text gives."""

    def problems(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        return list(caught.value.problems)

    return problems


def test_a_valid_recipe(load):
    recipe = load(VALID)
    assert (recipe.run, recipe.data.train[0].path, recipe.optim.learning_rate) == ("runs/x", "a.jsonl", 5e-7)
    assert recipe.lora == Lora()


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-7", 5e-7), ("1e-4", 1e-4), ("1.0e-4", 1e-4), (".5", 0.5), ("2.", 2.0), ("3", 3.0), ("1E+2", 100.0)],
)
def test_numbers(load, written, value):
    rate = load(VALID, f"optim.learning_rate={written}").optim.learning_rate
    assert (rate, type(rate)) == (value, float)


def test_every_problem_at_once_in_the_order_of_the_file(problems):
    text = """\
        stage: sft
        run: yes
        model: {base: x, dtyp: float32}
        seed: 3.0
        lora:
          r: "16"
          targets: q_proj
          weight_decay: 0.1
        data:
          train:
            - path: a
              fromat: alpaca
              columns: {prompt: 3}
            - format: alpca
          eval:
            fraction: 0.1
            sources: [{path: b}]
        optim:
          learing_rate: 5e-7
          lr: 1
          eps: 0
          eps: 1e-8
        batch: {row_tokens: 0}
        log: {trackers: [tensorbord]}
        train:
        """
    formats = (
        "'auto', 'alpaca', 'sharegpt', 'messages', 'prompt_completion', 'text', 'pairs', 'transcripts', 'ranked', "
        "'labelled', 'classes' or 'prompts'"
    )
    trackers = "'tensorboard', 'wandb', 'trackio' or 'mlflow'"
    optim = "learning_rate, schedule, warmup, min_ratio, weight_decay, beta1, beta2, eps, max_grad_norm"
    assert problems(text, "train.keep=1.5") == [
        "r.yaml:2: run: expected text, found yes, which YAML reads as true; put it in quotes: 'yes'",
        "r.yaml:3: unknown key 'dtyp' in model; did you mean 'dtype'?",
        "r.yaml:4: seed: expected a whole number at least 0 and below 4294967296, found the number 3.0",
        "r.yaml:6: lora.r: expected a whole number above 0, found the text '16'; drop the quotes",
        "r.yaml:7: lora.targets: expected a list (each item text) or 'all-linear', found the text 'q_proj'; "
        "write it as a list: [q_proj]",
        "r.yaml:8: unknown key 'weight_decay' in lora; it belongs in `optim`",
        "r.yaml:12: unknown key 'fromat' in data.train.0; did you mean 'format'?",
        "r.yaml:13: data.train.0.columns.prompt: expected text or null, found the number 3; put it in quotes: '3'",
        "r.yaml:14: missing key 'path' in data.train.1; it takes text",
        f"r.yaml:14: data.train.1.format: expected {formats}, found the text 'alpca'; did you mean 'alpaca'?",
        "r.yaml:15: data.eval: give either a fraction of the training rows or sources, not both",
        "r.yaml:19: unknown key 'learing_rate' in optim; did you mean 'learning_rate'?",
        f"r.yaml:20: unknown key 'lr' in optim; its keys are {optim}",
        "r.yaml:21: optim.eps: expected a number above 0, found the number 0",
        "r.yaml:22: duplicate key 'eps' in optim; it already stands on line 21",
        "r.yaml:23: batch.row_tokens: expected a whole number above 0 or 'auto', found the number 0",
        f"r.yaml:24: log.trackers.0: expected {trackers}, found the text 'tensorbord'; did you mean 'tensorboard'?",
        "override 'train.keep=1.5': train.keep: expected a whole number above 0, found the number 1.5",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lora.targets=[q, 3]", "lora.targets.1: expected text, found the number 3; put it in quotes: '3'"),
        ("lora=16", "lora: expected a section or null, found the number 16"),
        ("lora.r=0", "lora.r: expected a whole number above 0, found the number 0"),
        ("sft.start={r: 0}", "sft.start.r: expected a whole number above 0, found the number 0"),
        ("sft.start={q: 1}", "unknown key 'q' in sft.start; its keys are r, alpha, dropout, targets, rslora, dora, "
                             "init"),
        ("sft.start=atuo", "sft.start: expected a section, 'auto' or null, found the text 'atuo'; "
                           "did you mean 'auto'?"),
        ("batch.row_tokens=x", "batch.row_tokens: expected a whole number above 0 or 'auto', "
                               "found the text 'x'"),
        ("model.gradient_checkpointing='on'", "model.gradient_checkpointing: expected true or false, found the text "
                                              "'on'; drop the quotes"),
        ("data.train=[]", "data.train: expected a list (each item a section) of length 1 or more, "
                          "found an empty list"),
        ("optim.learning_rate=.inf", "optim.learning_rate: expected a number above 0, found the text '.inf'"),
        ("run=", "run: expected text, found nothing (null)"),
        ("seed=010", "seed: expected a whole number at least 0 and below 4294967296, found the text '010'"),
        ("optim.eps=1e999", "the number 1e999 is too large"),
        ("data.train.0.title=a/b", "data.train.0.title: take letters, digits, `.`, `-` and `_`, without an ending of "
                                   "figures (_low, _high, _share, _edges, _seconds, _per_second)"),
        ("data.train.0.title=x_low", "data.train.0.title: take letters, digits, `.`, `-` and `_`, without an ending of "
                                     "figures (_low, _high, _share, _edges, _seconds, _per_second)"),
        ("train.patience=2", "train: `patience` needs `best`: {metric: loss, goal: least}, which says what it waits "
                             "for"),
        ("train.best={metric: loss, goal: lest}", "train.best.goal: expected 'greatest' or 'least', found the text "
                                                  "'lest'; did you mean 'least'?"),
        ("train.best={metric: loss}", "missing key 'goal' in train.best; it takes 'greatest' or 'least'"),
        ("train.learning_rate=1", "unknown key 'learning_rate' in train; it belongs in `optim`"),
        ("train.seed=1", "unknown key 'seed' in train; it belongs in the top level"),
        ("optim.path=1", "unknown key 'path' in optim; it belongs in `data.train.0` or "
                         "`data.eval.sources.0` or `data.prepare.decontaminate.against.0`"),
        ("data.train.2.path=x", "data.train is a list of 1: give an index from 0 to 1 (1 appends), "
                                "found '2'"),
        ("data.train.path=x", "data.train is a list of 1: give an index from 0 to 1 (1 appends), "
                              "found 'path'"),
        ("run.folder=x", "run is the text 'runs/x', so nothing stands below it"),
        ("optim.eps", "write it as key.path=value, such as optim.learning_rate=1e-4"),
        ("optim..eps=1", "write it as key.path=value, such as optim.learning_rate=1e-4"),
        ("data.train.1.format=text", "missing key 'path' in data.train.1; it takes text"),
        ("run=!!python/name:os.system", "this is not YAML: tags (!) have no meaning in a recipe"),
        ("model.base=*name", "this is not YAML: found undefined alias 'name'; a text that begins with * & ! % @ or ` "
                             "stands in quotes"),
        ("model.base=@name", "this is not YAML: while scanning for the next token, found character '@' that cannot "
                             "start any token; a text that begins with * & ! % @ or ` stands in quotes"),
        ("log.samples=[a", "this is not YAML: while parsing a flow sequence, expected ',' or ']', "
                           "but got '<stream end>'"),
    ],
)  # fmt: skip
def test_one_message_for_one_fault_and_overrides_name_themselves(problems, override, problem):
    (line,) = problems(VALID, override)
    assert line == f"override {override!r}: {problem}"


@pytest.mark.parametrize("override", ["optim.eps=" + "x" * 9999, "x" * 9999 + "=1", "optim." + "x" * 9999 + "=1"])
def test_a_long_override_is_named_by_its_beginning(problems, override):
    (line,) = problems(VALID, override)
    assert line.startswith(f"override {override[:99]}…'".replace("override ", "override '"))
    assert len(line) < 400


def test_overrides_follow_the_path(load):
    recipe = load(
        VALID,
        "optim.learning_rate=1e-4",
        "data.train.0.path=my.jsonl",
        "data.train.1.path=more=less.jsonl",
        "data.eval.sources.0.path=held.jsonl",
        "lora=null",
        "lora.r=4",
        "log.samples=[a, 'b: c']",
    )
    assert recipe.optim.learning_rate == 1e-4
    assert [source.path for source in recipe.data.train] == ["my.jsonl", "more=less.jsonl"]
    assert recipe.data.eval.sources[0].path == "held.jsonl"
    assert recipe.lora == Lora(r=4)
    assert recipe.log.samples == ["a", "b: c"]


def test_an_override_mends_what_the_file_has_wrong(load):
    assert load(VALID.replace("5e-7", "fast"), "optim.learning_rate=1").optim.learning_rate == 1


def test_a_failed_override_leaves_the_lines_of_the_file(problems):
    lines = problems(VALID.replace("5e-7", "fast"), "optim=[")
    assert [line.partition(": ")[0] for line in lines] == ["r.yaml:8", "override 'optim=['"]


def test_missing_sections_are_placed_at_the_section_around_them(problems):
    assert problems("# a comment\n\nstage: sft\ndata:\n  max_length: 3\nrun: x\n") == [
        "r.yaml:3: missing key 'model' in the recipe; it takes a section",
        "r.yaml:4: missing key 'train' in data; it takes a list (each item a section) of length 1 or more",
    ]


def test_a_rule_over_several_sections(problems):
    assert problems(VALID, "model.quantize=4bit", "lora=null") == [
        "r.yaml:1: a quantised trunk cannot be trained: give a `lora` section or drop `model.quantize`"
    ]


def test_float16_is_refused_where_something_trains(problems):
    (said,) = problems(VALID, "model.dtype=float16")
    assert said.startswith("r.yaml:1: `model.dtype: float16` cannot train")
    assert "bfloat16" in said


def test_another_stage_is_the_only_thing_said(problems):
    assert problems("# ours\nstage: dpo\noptim: 3\ndpo: {beta: 0.1}\nrun: x\nrun: y\n") == [
        "r.yaml:2: this is a recipe of stage 'dpo'; run it with: accelerate launch -q -m align.dpo r.yaml"
    ]


def test_a_mistyped_stage_is_an_ordinary_fault(problems):
    assert problems(VALID.replace("sft", "stf")) == [
        "r.yaml:1: stage: expected 'sft', found the text 'stf'; did you mean 'sft'?"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "r.yaml: the file is empty; a recipe needs at least stage, run, model and data"),
        ("# only this\n", "r.yaml: the file is empty; a recipe needs at least stage, run, model and data"),
        ("\n- a\n", "r.yaml:2: a recipe is a mapping of `key: value` lines at its top level, found a list"),
        ("a\nb: [", "r.yaml:2: this is not YAML: mapping values are not allowed here"),
        ("a: b\n\tc: d", "r.yaml:2: this is not YAML: while scanning for the next token, "
                         "found character '\\t' that cannot start any token"),
        (b"a: b\n# \xff\n", "r.yaml:2: not UTF-8 text; save the file as UTF-8"),
        (b"a: b\nc: \x07\n", "r.yaml:2: this is not YAML: the character '\\x07'"),
        ('a: b\nc: "\\UFFFFFFFF"\n', "r.yaml:2: this is not YAML: "),
        ("a: b\n---\nc: d\n", "r.yaml:2: this is not YAML: expected a single document in the stream, "
                              "but found another document"),
        ("a: " + "[" * 5000, "r.yaml:1: this is not YAML: nested more than 32 deep"),
        ("a: &a [*a]", "r.yaml:1: the anchors unfold into too much; write the values out"),
        ("a: *b", "r.yaml:1: this is not YAML: found undefined alias 'b'"),
        ("a: b\nc: !!python/object:os.system {}", "r.yaml:2: this is not YAML: tags (!) have no meaning"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(problems, text, problem):
    (line,) = problems(text)
    assert line.startswith(problem)


def test_merge_keys(load, problems):
    """`<<` takes what its own section lacks from one or several others; quoted it is a key like any other."""
    recipe = load("""
        stage: sft
        run: r
        model: {base: y, <<: {dtype: float32, base: not this}}
        data:
          train:
            - &one {path: a, columns: {prompt: q}, weight: 2.0}
            - <<: *one
              path: b
            - <<: [{limit: 3, weight: 3.0}, *one]
            - <<: {<<: *one, limit: 4}
    """)
    assert (recipe.model.base, recipe.model.dtype) == ("y", "float32")
    assert all(source.columns == {"prompt": "q"} for source in recipe.data.train)
    assert [(source.path, source.weight, source.limit) for source in recipe.data.train] == [
        ("a", 2.0, None), ("b", 2.0, None), ("a", 3.0, 3), ("a", 2.0, 4)
    ]  # fmt: skip
    common = "stage: sft\nrun: r\ndata: {train: [{path: a}]}\n"
    for model, said in (
        ("{base: b, <<: 3}", "`<<` in model: expected a section to merge, such as `<<: *name`"),
        ("{base: b, '<<': {dtype: float32}}", "unknown key '<<' in model"),
        ("{base: b, <<: {dtpe: float32}}", "unknown key 'dtpe' in model; did you mean 'dtype'?"),
    ):
        (problem,) = problems(f"{common}model: {model}")
        assert problem.startswith(f"r.yaml:4: {said}")


def unfolding(first: str, item: str) -> str:
    """Each line repeats the one before nine times."""
    return f"a: &a {first}\n" + "".join(
        f"{c}: &{c} {item.format(','.join([f'*{p}'] * 9))}\n" for p, c in pairwise("abcdefghi")
    )


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {<<: *a}",
        unfolding("{x: 1, y: 2}", "{{<<: [{}]}}"),
        unfolding("[1, 2, 3]", "[{}]"),
        f"a: &a [{'x' * 200_000}]\nb: [{'*a,' * 9000}]",
    ],
)
def test_bombs_are_refused_at_once(problems, text):
    started = time.process_time()
    assert problems(text)[0].endswith("the anchors unfold into too much; write the values out")
    assert time.process_time() - started < 3


def test_very_many_problems_are_counted(problems):
    """Of a list that is wrong throughout: the first are told, in the time that it takes to read them."""
    started = time.process_time()
    found = problems("stage: sft\nrun: r\nmodel: {base: b}\ndata:\n  train:\n" + "    - {pth: a}\n" * 3000)
    assert len(found) == 101
    assert found[0] == "r.yaml:6: missing key 'path' in data.train.0; it takes text"
    assert found[-1] == "r.yaml:56: 5,900 more problems from here on"
    assert time.process_time() - started < 10


def test_an_override_inside_an_anchor_leaves_its_other_uses(load):
    shared = VALID.replace("- path: a.jsonl", "- &a {path: a.jsonl}\n    - *a")
    assert [s.path for s in load(shared, "data.train.0.path=b").data.train] == ["b", "a.jsonl"]


def test_no_such_file(tmp_path):
    (tmp_path / "chat.yaml").write_text(VALID)

    def fault(path: str) -> str:
        with pytest.raises(UserError) as caught:
            load_recipe(tmp_path / path, [], Recipe)
        return str(caught.value).replace(str(tmp_path), "")

    assert fault("caht.yaml") == "/caht.yaml: no such recipe; did you mean '/chat.yaml'?"
    assert fault("chat") == "/chat: no such recipe; did you mean '/chat.yaml'?"
    assert fault("nowhere/x.yaml") == "/nowhere/x.yaml: no such recipe"
    assert fault(".") == ": this is a folder; name a recipe file in it"
    assert fault("n" * 300).endswith("cannot be read: File name too long")
    (tmp_path / "big.yaml").write_text("a" * 2**19)
    assert fault("big.yaml").startswith("/big.yaml: not a recipe")


def test_the_resolved_recipe_is_itself_a_recipe(load):
    recipe = load(VALID, "log.samples=['yes', '1e-4', '010', \"a\\n b\\n\", 你好, '']", "optim.learning_rate=5e-7")
    text = dump_recipe(recipe)
    assert load(text) == recipe
    assert "你好" in text
    assert "  - |\n    a\n     b\n" in text
