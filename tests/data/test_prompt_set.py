"""Prompts to be answered while a run trains: of every format, each once, with the answer that its row has."""

from __future__ import annotations

import pytest
from data.voices import SMOLLM, tiny_tokenizer
from world import pair, talk, write_rows

from align.data.examples import Examples, Ledger, Part
from align.data.formats.prompts import prompts
from align.data.formats.references import reference
from align.data.mixture import prepare
from align.data.prompt_set import prompt_set
from align.data.templates.preferences import labelled, preferences
from align.data.templates.render import conversations
from align.recipe.errors import UserError
from align.recipe.preparing.preparation import Preparation
from align.recipe.preparing.privacy import Privacy
from align.recipe.schema import Data, Source

TOKENIZER = tiny_tokenizer(SMOLLM)
NOTHING = Examples([], 512)


def data(path, **section) -> Data:
    return Data(train=[Source(path=str(path))], **{"max_length": 512} | section)


def asked(path, most=100, ledger=None, **section):
    own = Source(path=str(path), **section.pop("source", {}))
    return prompt_set([own], NOTHING, data(path, **section), most, 0, TOKENIZER, ledger or Ledger())


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "p", "completion": "c"}, "c"),
        ({"question": "p", "answer": 42}, "42"),
        ({"question": "p", "answer": "a", "completion": "c"}, "a"),
        ({"instruction": "p", "input": "i", "output": "o"}, "o"),
        (talk("p", "first", "second"), "second"),
        ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "g"}]}, "g"),
        ({"messages": talk("p", "a")["messages"][:1]}, None),
        ({"prompt": "p"}, None),
        (pair("p", " Rome"), "It is Rome, my dear."),
        ({"chosen": talk("p", "good")["messages"], "rejected": talk("p", "bad")["messages"]}, "good"),
        ({"chosen": "\n\nHuman: p\n\nAssistant: yes", "rejected": "\n\nHuman: p\n\nAssistant: no"}, "yes"),
        ({"prompt": "p", "answers": ["worse", "best"], "scores": [1, 2]}, "best"),
        ({"prompt": "p", "completion": "c", "label": True}, "c"),
        ({"prompt": "p", "completion": "c", "label": False}, None),
        ({"text": "Once upon a time"}, None),
    ],
)
def test_every_format_gives_its_prompt_and_its_answer(tmp_path, row, wanted):
    found = asked(write_rows(tmp_path / "rows.jsonl", [row]))
    assert found.references == [wanted]
    text = TOKENIZER.decode(found.stems[0])
    if "text" in row:
        assert text == row["text"]
    else:
        assert text.endswith("<|im_start|>assistant\n"), text
        assert "p" in text
    assert found.where == [f"{tmp_path}/rows.jsonl:1"]


def test_a_label_that_is_no_verdict_says_nothing():
    assert reference({"prompt": "p", "completion": "c", "label": "sports"}) == "c"


def test_each_prompt_once_and_a_choice_that_the_seed_fixes(tmp_path):
    rows = [{"prompt": f"p{i % 30}", "completion": f"c{i}"} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    everything = asked(path)
    assert everything.references == [f"c{i}" for i in range(30)], "the first row of each"
    assert len(set(everything.keys)) == 30
    few = asked(path, most=7)
    assert few.said == ["7 of 30 held-out prompts are answered"]
    assert few.where == asked(path, most=7).where != everything.where[:7]
    assert [everything.where.index(where) for where in few.where] == sorted(map(everything.where.index, few.where))
    assert everything.identity != few.identity
    changed = write_rows(tmp_path / "rows.jsonl", [row | {"note": 1} for row in rows])
    assert asked(changed).identity != everything.identity, "a function may read it"
    assert asked(changed).keys == everything.keys


def test_a_prompt_takes_the_answer_of_its_first_row_that_has_one(tmp_path):
    """As of KTO: the first row's answer is a bad one."""
    rows = [{"prompt": "p", "completion": f"c{i}", "label": i > 0} for i in range(3)]
    found = asked(write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "q"}]))
    assert found.references == ["c1", None]


def test_rows_that_cannot_be_taken_follow_the_recipe(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p"}, {"prompt": ""}, {"prompt": "word " * 400}])
    with pytest.raises(UserError) as caught:
        asked(path, max_length=256)
    told = "\n".join(caught.value.problems)
    assert f"{path}:2: " in told
    assert "train.generate.sources: 1 row cannot be taken" in told
    assert "longer than data.max_length = 256 tokens" in told
    ledger = Ledger()
    found = asked(path, ledger=ledger, max_length=256, invalid="drop", overlong="drop")
    assert len(found.stems) == 1
    assert sorted(ledger.dropped) == ["invalid", "overlong"]
    assert "2 rows without a prompt to answer are left out" in found.said
    write_rows(path, [{"prompt": ""}])
    with pytest.raises(UserError, match="no row of its sources has a prompt to be answered"):
        asked(path, invalid="drop")


@pytest.mark.parametrize("reading", [conversations("assistant"), preferences()], ids=["sft", "dpo"])
def test_the_prompts_of_the_eval_rows_are_those_of_that_side_alone(tmp_path, reading):
    rows = [pair(f"What of {i}?", f" city{i}") for i in range(20)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    section = data(path, eval={"fraction": 0.25})
    prepared = prepare(section, TOKENIZER, reading, 3, tmp_path / "cache")
    found = prompt_set([], prepared.eval, section, 100, 3, TOKENIZER, Ledger())
    assert len(found.stems) == len(prepared.eval) == 5
    for where, reference_, asked_ in zip(found.where, found.references, found.rows, strict=True):
        row = rows[int(where.rpartition(":")[2]) - 1]
        assert (reference_, asked_.record["prompt"]) == (row["chosen"], row["prompt"])
    whole = {prepared.eval.where(i): prepared.eval.tree(i).segments[0].tolist() for i in range(5)}
    for where, stem in zip(found.where, found.stems, strict=True):
        assert whole[where][: len(stem)] == stem.tolist()[: len(whole[where])]


def test_texts_that_are_learnt_ask_for_nothing(tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"Once upon a time {i}."} for i in range(8)])
    section = data(texts, eval={"fraction": 0.5})
    prepared = prepare(section, TOKENIZER, conversations("assistant"), 0, tmp_path / "cache")
    with pytest.raises(UserError, match=r"no row of data\.eval has a prompt .* give rows with prompts in train\.gen"):
        prompt_set([], prepared.eval, section, 10, 0, TOKENIZER, Ledger())
    assert isinstance(prepared.eval.parts[0], Part)


@pytest.mark.parametrize("reading", [conversations("assistant"), prompts(), labelled()], ids=["sft", "ppo", "kto"])
def test_rows_that_were_prepared_are_asked_as_the_steps_left_them(tmp_path, reading):
    """A mail address is masked in prompt and reference; of KTO's rows, only good answers are references."""
    rows = [
        {
            "prompt": f"Who is person {i}, mike{i}@example.org?",
            "completion": f"Mike {i}, mike{i}@example.org.",
            "label": i % 2 == 0,
        }
        if reading.name.startswith("labelled")
        else {"prompt": f"Who is person {i}, mike{i}@example.org?", "completion": f"Mike {i}, mike{i}@example.org."}
        for i in range(12)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    section = data(path, eval={"fraction": 0.5}, prepare=Preparation(privacy=Privacy()))
    prepared = prepare(section, TOKENIZER, reading, 1, tmp_path / "cache")
    found = prompt_set([], prepared.eval, section, 100, 1, TOKENIZER, Ledger())
    assert len(found.stems) == len(prepared.eval) == 6
    for where, said, row, stem in zip(found.where, found.references, found.rows, found.stems, strict=True):
        number = int(where.rpartition(":")[2]) - 1
        assert "example.org" not in f"{said} {row.record} {TOKENIZER.decode(stem)}"
        assert said is None if number % 2 and "label" in row.record else said.startswith(f"Mike {number}, ")
