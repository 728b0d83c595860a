"""What a user can do wrong with reward and dpo: one clear message, status 2, nothing written; and rows at random."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from often import often
from test_fuzz_command import FLAGS, FUZZ, check, damaged
from world import align, lines, pair, talk, tree, verdicts, write_rows

from align import dpo, reward

GOOD, OTHER = pair("Name the capital of Peru", " Lima"), pair("Name the capital of Cuba", " Havana")
STAGES = pytest.mark.parametrize("stage", [reward, dpo], ids=["reward", "dpo"])


@pytest.fixture
def refused(world, here):
    """Run a stage on `rows`: its message, seen to be all that is left of it."""

    def run(stage, *argv, rows=None, **sections):
        if rows is not None:
            write_rows(here / "rows.jsonl", rows)
            data = {"train": [{"path": "rows.jsonl"}], "eval": {"sources": []}}
            sections = {"data": data | sections.pop("data", {})} | sections
        recipe = world.preferences(here / "recipe.yaml", stage, **sections)
        before = tree(here)
        told = align(recipe, *argv, stage=stage)
        assert told.status == 2, told.out
        assert "Traceback" not in told.out + told.err
        assert tree(here) == before, "a refused run must write nothing"
        return told.err.replace(f"{here}/", "").rstrip("\n")

    return run


@STAGES
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"rejected": GOOD["chosen"]}, "rows.jsonl:2: rejected: expected another answer than chosen"),
        (GOOD | {"chosen": ""}, "rows.jsonl:2: chosen: expected text, found an empty text"),
        (GOOD | {"rejected": "  "}, "rows.jsonl:2: rejected: expected text, found "),
        (GOOD | {"rejected": None}, "rows.jsonl:2: rejected: expected text, found nothing"),
        (
            {
                "chosen": talk("Hi", "Hello", "And you?")["messages"],
                "rejected": talk("Hi", "Go away", "And you?")["messages"],
            },
            "rows.jsonl:2: rejected: expected the same turns as chosen before the last, found them to part at turn 2",
        ),
        (GOOD | {"margin": "wide"}, "rows.jsonl:2: margin: expected a finite number, found the text 'wide'"),
        (GOOD | {"margin": 1e999}, "rows.jsonl:2: margin: expected a finite number, found "),
        (GOOD | {"prompt": ""}, "rows.jsonl:2: prompt: "),
        ('{"prompt": "Hi", "chosen"', "rows.jsonl:2: broken JSON at column "),
    ],
    ids=["same", "empty", "blank", "null", "part early", "margin text", "margin inf", "no prompt", "broken"],
)
def test_a_row_that_is_no_preference(refused, here, world, stage, row, message):
    """Refused by name; with `invalid: drop` it stands in the ledger, and the others train."""
    said = refused(stage, "--show", rows=[GOOD, row, OTHER])
    assert said.startswith(message), said
    if isinstance(row, dict):
        shown = align("recipe.yaml", "--show", "data.invalid=drop", stage=stage)
        assert shown.status == 0, shown.err
        assert "3 rows read, 1 dropped (1 invalid)" in shown.out
        assert re.search(r"train: 2 \w+,", shown.out)


@STAGES
def test_all_faults_of_a_file_at_once(refused, stage):
    said = refused(stage, rows=[GOOD, GOOD | {"chosen": ""}, OTHER | {"margin": []}])
    assert [re.match(r"rows\.jsonl:\d", line)[0] for line in said.split("\n")[:2]] == ["rows.jsonl:2", "rows.jsonl:3"]


@STAGES
def test_no_row_is_left(refused, stage):
    bad = GOOD | {"rejected": GOOD["chosen"]}
    said = refused(stage, rows=[bad, bad], data={"invalid": "drop"})
    reason = "rejected: expected another answer than chosen, found the same"
    told = [f"rows.jsonl:{line}: {reason}" for line in (1, 2)]
    assert said.split("\n") == ["data.train: no row is left of 2 read; dropped: 2 invalid", *told]


@STAGES
@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_a_prompt_that_leaves_no_room(refused, stage, policy):
    rows = [pair("Say " * 400, " Lima"), pair("Tell " * 400, " Rome")]
    said = refused(stage, rows=rows, data={"max_length": 200, "overlong": policy})
    if policy == "error":
        assert said.startswith("2 rows longer than data.max_length = 200 tokens")
    else:
        assert said.startswith("data.train: no row is left of 2 read; dropped: 2 overlong\nrows.jsonl:1: ")


@STAGES
@pytest.mark.parametrize(
    "rows", [[talk("Hello", "Hi")], [{"instruction": "a", "output": "b"}], [{"text": "Lima"}], verdicts(GOOD)]
)
def test_rows_of_another_job(refused, stage, rows):
    """Conversations, plain text and verdicts are no preferences, and the columns that are wanted are named."""
    said = refused(stage, rows=rows)
    assert said.startswith("rows.jsonl")
    assert "chosen" in said
    assert "rejected" in said


def test_pairs_are_no_verdicts(refused):
    said = refused(dpo, rows=[GOOD], dpo={"loss": "kto"})
    assert said.startswith("rows.jsonl")
    assert "label" in said


def test_verdicts_of_one_kind(refused):
    rows = [row for row in (*verdicts(GOOD), *verdicts(OTHER)) if row["label"]]
    assert refused(dpo, rows=rows, dpo={"loss": "kto"}).startswith(
        "data.train: 2 of its answers are desirable and 0 undesirable, and kto learns from how they differ; add rows"
    )


@STAGES
def test_chunks_of_preferences(refused, stage):
    assert refused(stage, rows=[GOOD], data={"overlong": "chunk"}).startswith("data.overlong: chunk cuts texts that")


def test_a_verdict_that_is_none(refused):
    said = refused(dpo, rows=[verdicts(GOOD)[0] | {"label": "maybe"}], dpo={"loss": "kto"})
    assert said.startswith(
        "rows.jsonl:1: label: expected true or false, 1 or 0 or -1, desirable or undesirable, good or bad, found the "
        "text 'maybe'; where the column is no verdict on the answer, leave it unread: `columns: {label: null}`\n"
    )


@STAGES
def test_a_data_file_that_is_missing(refused, world, stage):
    near = str(world.pairs).replace("/pairs", "/pair")
    assert refused(stage, f"data.train.0.path={near}") == (
        f"{near}: no such file or folder; did you mean '{world.pairs}'?"
    )


def test_a_recipe_of_another_stage(world, here):
    recipe = world.preferences(here / "other.yaml", dpo)
    told = align(recipe, stage=reward)
    assert (told.status, told.err.replace(f"{here}/", "")) == (
        2,
        "other.yaml:1: this is a recipe of stage 'dpo'; run it with: accelerate launch -q -m align.dpo other.yaml\n",
    )
    assert set(tree(here)) == {"other.yaml"}


@pytest.mark.parametrize(
    ("stage", "section", "message"),
    [
        (reward, {"log": {"samples": ["Hi"]}}, "`log.samples`: a reward model scores answers and writes none"),
        (reward, {"reward": {"centring": -1.0}}, "reward.centring: "),
        (reward, {"reward": {"pair": "all"}}, "unknown key 'pair' in reward; did you mean 'pairs'?"),
        (dpo, {"reward": {"centring": 0.1}}, "unknown key 'reward' in the recipe"),
        (dpo, {"dpo": {"beta": 0.0}}, "dpo.beta: "),
        (dpo, {"dpo": {"loss": "sigmod"}}, "dpo.loss: "),
        (dpo, {"dpo": {"loss": "robust", "label_smoothing": 0.5}}, "dpo.label_smoothing: "),
        (dpo, {"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "belongs to the losses sigmoid and robust, not to ipo"),
        (dpo, {"dpo": {"loss": "kto", "reference": "cached"}}, "`dpo.reference: cached` is not for the loss kto"),
        (dpo, {"dpo": {"loss": "simpo", "reference": "cached"}}, "`dpo.reference: cached` is not for the loss simpo"),
        (dpo, {"dpo": {"loss": "orpo", "sft_weight": 0.1}}, "`dpo.sft_weight` is not for the loss orpo"),
        (dpo, {"dpo": {"loss": "kto"}, "batch": {"examples": 1}}, "`batch.examples`: kto takes its baseline from"),
        (dpo, {"dpo": {"loss": "kto"}, "lora": {"dropout": 0.1}}, "`lora.dropout` makes the baseline of kto random"),
    ],
)
def test_settings_that_do_not_fit(refused, stage, section, message):
    assert message in refused(stage, **section)


@STAGES
def test_an_adapter_that_is_none(refused, stage):
    assert refused(stage, "model.adapter=nowhere").startswith("model.adapter: nowhere has no ")


MODEST = settings(FUZZ, max_examples=often(400))


def ends_well(told):
    """As the fuzz of sft has it; rows are counted as pairs where all are."""
    check(told._replace(out=re.sub(r"train: (\d+) pairs?,", r"train: \1 rows,", told.out)))


@pytest.fixture(params=[(reward, "pairs"), (dpo, "pairs"), (dpo, "verdicts")], ids=["reward", "dpo", "kto"])
def job(world, here, request):
    """A stage, its recipe and rows of its kind."""
    stage, kind = request.param
    sections = {"dpo": {"loss": "kto"}} if kind == "verdicts" else {}
    rows = lines(getattr(world, kind))[:3]
    if kind == "pairs":
        rows[1] = rows[1] | {"margin": 0.5}
        rows[2] = {side: talk(rows[2]["prompt"], rows[2][side])["messages"] for side in ("chosen", "rejected")}
    return stage, world.preferences(here / "recipe.yaml", stage, **sections), rows


@MODEST
@given(data=st.data())
def test_damaged_rows(job, here, data):
    """Keys and values replaced, removed, renamed, by any JSON."""
    stage, recipe, good = job
    rows = [damaged(row, data.draw) if data.draw(st.booleans()) else row for row in good]
    try:
        write_rows(here / "rows.jsonl", [json.dumps(row) for row in rows])
    except UnicodeEncodeError:  # the test's own text
        return
    mode = data.draw(st.sampled_from(["error", "drop"]))
    words = ("data.train.0.path=rows.jsonl", f"data.invalid={mode}", "data.eval.sources=[]")
    ends_well(align(recipe, "--show", *words, stage=stage))


@MODEST
@given(data=st.data())
def test_damaged_settings(job, data):
    """A key of the stage's own section, or of those around it, given anything."""
    stage, recipe, _ = job
    own = stage.__name__.removeprefix("align.")
    names = [
        f"{own}.{name}"
        for name in type(stage.Recipe.model_fields[own].get_default(call_default_factory=True)).model_fields
    ]
    words = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([*names, own, "lora.dropout", "data.max_length", "log.samples", "model.adapter"]),
                st.sampled_from(
                    ["", "null", "0", "-1", "0.3", "nan", "inf", "1e400", "kto", "cached", "ipo", "[a]", "{}", "all"]
                ),
            ).map("=".join)
            | FLAGS,
            max_size=3,
        )
    )
    ends_well(align(recipe, "--show", *words, stage=stage))
