"""Prompts of every format: the stem is what the template writes before the answer, and each keeps its row."""

from __future__ import annotations

import json

import pytest
from data.voices import SMOLLM, VOICES, make_row, talk_of, tiny_tokenizer, written

from align.data.formats.formats import Fault
from align.data.formats.prompts import Asked, asked, prompts
from align.data.mixture import prepare
from align.data.templates.templates import chat_tokenizer
from align.recipe.errors import UserError
from align.recipe.schema import Data, Eval, Source

TALK = talk_of("hi", "earlier", "and?", system="Be brief.")
LOOK_UP = {"name": "look_up", "description": "d", "parameters": {}}
ROWS = {
    "prompt": ({"prompt": "hi"}, talk_of("hi")),
    "prompt and system": ({"prompt": "hi", "system": "S"}, talk_of("hi", system="S")),
    "prompt of turns": ({"prompt": TALK}, TALK),
    "messages": ({"messages": TALK}, TALK),
    "messages that end with an answer": ({"messages": [*TALK, {"role": "assistant", "content": "x"}]}, TALK),
    "conversations": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "earlier"},
                {"from": "human", "value": "and?"},
                {"from": "gpt", "value": "x"},
            ],
            "system": "Be brief.",
        },
        TALK,
    ),
    "instruction and input": ({"instruction": "Add", "input": "1 2", "output": "3"}, talk_of("Add\n1 2")),
    "question": ({"question": "hi", "answer": "#### 4"}, talk_of("hi")),
    "a verdict": ({"prompt": "hi", "completion": "x", "label": False}, talk_of("hi")),
    "pair": ({"prompt": "hi", "chosen": "x", "rejected": "y"}, talk_of("hi")),
    "pair of whole conversations": (
        {side: [*TALK, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        TALK,
    ),
    "transcript": (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: earlier\n\nHuman: and?\n\nAssistant: x",
            "rejected": "\n\nHuman: hi\n\nAssistant: earlier\n\nHuman: and?\n\nAssistant: y",
        },
        TALK[1:],
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, rows):
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def prepared(folder, *sources, tokenizer=None, **fields):
    """Of file names, or sources with more to them."""
    train = [Source(path=source) if isinstance(source, str) else source for source in sources]
    data = Data(train=train, **{"max_length": 300} | fields)
    return prepare(data, tokenizer or tiny_tokenizer(SMOLLM), prompts(), 3, folder / "cache")


@pytest.mark.parametrize("name", ROWS)
def test_every_format_asks_the_same(folder, name):
    """And ends as the template opens the assistant's turn."""
    row, messages = ROWS[name]
    save(folder / "rows.jsonl", [row])
    tokenizer = tiny_tokenizer(SMOLLM)
    examples = prepared(folder, "rows.jsonl").train
    tree = examples.tree(0)
    assert len(tree.segments) == 1
    assert not tree.trained[0].any()
    opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tree.segments[0].tolist() == opened
    assert asked(examples) == [Asked(row, messages, None)]


@pytest.mark.parametrize("name", VOICES)
def test_the_stem_is_what_the_template_writes_before_an_answer(folder, name):
    """With a generation prompt of its own or none."""
    voice = VOICES[name]
    messages = talk_of("hi", "earlier", "你好 🌸")
    save(folder / "rows.jsonl", [{"prompt": messages}])
    tokenizer = voice.tokenizer()
    (stem,) = prepared(folder, "rows.jsonl", tokenizer=tokenizer).train.tree(0).segments
    before = tokenizer.decode(stem)
    whole = written([*messages, {"role": "assistant", "content": "Yes"}], tokenizer)
    assert whole.startswith(before + voice.trained("Yes"))
    assert stem.tolist() == tokenizer(before, add_special_tokens=False)["input_ids"]


def test_the_plain_template_and_texts(folder):
    """A base that knows text alone; the beginning of a text has no end."""
    tokenizer = chat_tokenizer(tiny_tokenizer(eos_token="</s>"), "plain")
    save(folder / "rows.jsonl", [{"prompt": "hi"}])
    save(folder / "texts.jsonl", [{"text": "Once upon"}])
    examples = prepared(folder, "rows.jsonl", "texts.jsonl", tokenizer=tokenizer).train
    assert [tokenizer.decode(examples.tree(i).segments[0]) for i in (0, 1)] == ["User: hi\n\nAssistant:", "Once upon"]
    assert asked(examples)[1] == Asked({"text": "Once upon"}, None, "Once upon")


def test_tools_are_written(folder):
    save(folder / "rows.jsonl", [{"prompt": "hi", "tools": [LOOK_UP]}])
    template = SMOLLM.replace("{% for message", "{% if tools %}{{ tools[0] | tojson }}{% endif %}{% for message", 1)
    tokenizer = tiny_tokenizer(template)
    (stem,) = prepared(folder, "rows.jsonl", tokenizer=tokenizer).train.tree(0).segments
    assert '"name": "look_up"' in tokenizer.decode(stem)


def test_each_example_keeps_its_row(folder):
    """Of several sources, one of them twice in other columns, with limits, dropped rows and a side held out."""
    save(folder / "a.jsonl", [{"prompt": f"a{i}", "other": f"o{i}", "answer": i} for i in range(9)])
    save(folder / "b.jsonl", [{"prompt": f"b{i}" if i % 3 else "", "answer": 100 + i} for i in range(9)])
    save(
        folder / "c.jsonl",
        [{"messages": talk_of(f"c{i}" * (200 if i == 1 else 1)), "answer": 200 + i} for i in range(5)],
    )
    sources = (
        "a.jsonl", "b.jsonl", Source(path="a.jsonl", columns={"prompt": "other"}, limit=4), "c.jsonl",
    )  # fmt: skip
    made = prepared(folder, *sources, invalid="drop", overlong="drop", eval=Eval(fraction=0.3))
    tokenizer, seen = tiny_tokenizer(SMOLLM), []
    for side in (made.train, made.eval):
        rows = asked(side)
        assert len(rows) == len(side) > 0
        for i, row in enumerate(rows):
            question = row.messages[-1]["content"]
            assert f"<|im_start|>user\n{question}<|im_end|>" in tokenizer.decode(side.tree(i).segments[0])
            assert row.record["answer"] == {"a": 0, "o": 0, "b": 100, "c": 200}[question[0]] + int(question[1])
            seen.append(question)
    kept = [*(f"a{i}" for i in range(9)), *(f"b{i}" for i in (1, 2, 4, 5, 7, 8)), *(f"o{i}" for i in range(4))]
    assert sorted(seen) == sorted([*kept, "c0", "c2", "c3", "c4"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "prompt: expected one of the columns prompt, conversations, messages, instruction"),
        ({"prompt": None}, "prompt: expected one of the columns "),
        ({"prompt": "  "}, "prompt: expected text, found only white space"),
        ({"prompt": 7}, "prompt: expected "),
        ({"prompt": []}, "prompt: expected one of the columns "),
        ({"prompt": [{"role": "system", "content": "S"}]}, "prompt: expected one of the columns "),
        ({"prompt": "q", "image": "cat.png"}, "image: only text can be learnt, and this row refers to images"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "prompt: expected one of the columns "),
        ({"prompt": "hi", "tools": [{"nameless": 1}]}, "tools[0]: expected a function with a `name`"),
        ('{"prompt": "hi"', "broken JSON at column "),
    ],
)
def test_a_row_that_asks_nothing(folder, row, reason):
    """Refused with file and line; with `invalid: drop` the others stay."""
    save(folder / "rows.jsonl", [{"prompt": "q"}, row, {"prompt": "r"}])
    with pytest.raises(UserError) as error:
        prepared(folder, "rows.jsonl")
    assert error.value.problems[0].startswith("rows.jsonl:2: ")
    assert reason in error.value.problems[0]
    examples = prepared(folder, "rows.jsonl", invalid="drop").train
    assert [row.messages[0]["content"] for row in asked(examples)] == ["q", "r"]


def test_a_template_that_writes_the_prompt_by_its_answer(folder):
    """What stands before an answer could not be told without it."""
    peeking = SMOLLM.replace("{% for message", "{{ (messages | last)['content'][:1] }}{% for message", 1)
    save(folder / "rows.jsonl", [{"prompt": "q"}])
    with pytest.raises(UserError) as error:
        prepared(folder, "rows.jsonl", tokenizer=tiny_tokenizer(peeking))
    assert error.value.problems[0].startswith("rows.jsonl:1: ")
    assert "changes or leaves out an assistant turn" in error.value.problems[0]


def test_files_of_other_jobs_are_refused(folder):
    save(folder / "rows.jsonl", [{"sentence": "a", "label": 1}])
    with pytest.raises(UserError, match=r"rows.jsonl: no format fits its columns `sentence`, `label`: .*prompts needs"):
        prepared(folder, "rows.jsonl")
    with pytest.raises(UserError, match="this stage takes no rows of format classes; it reads transcripts, prompts"):
        prepared(folder, Source(path="rows.jsonl", format="classes"))


def test_a_prompt_without_a_token():
    (fault,) = prompts().render([make_row(text="")], tiny_tokenizer(SMOLLM))
    assert isinstance(fault, Fault)
    assert (fault.file, fault.line, fault.reason) == ("rows.jsonl", 7, "no token in the prompt, to go on from")
