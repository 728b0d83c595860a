"""Preferences in every shape, worked by hand; every reason to refuse one; and thousands of mutated rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.mutants import mutated
from hypothesis import given, settings
from often import often

from align.data.formats.answers import BEST, COMPARED, JUDGED
from align.data.formats.formats import FORMATS, Fault, Row, convert, detect, find, read_rows
from align.data.templates.preferences import labelled, preferences
from align.data.templates.render import conversations
from align.recipe.schema import Source

TEMPLATES = Path(__file__).parents[3] / "data_templates"
ALL = {**COMPARED, **JUDGED}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def gpt(content):
    return {"from": "gpt", "value": content}


def human(content):
    return {"from": "human", "value": content}


def parts(role, content, weight):
    return {"role": role, "content": [{"type": "text", "value": content}], "loss_weight": weight}


def hh(*words):
    """A transcript of Human and Assistant in turn."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {said}" for i, said in enumerate(words))


HI = [user("hi")]
LONG = [system("Be kind."), user("hi"), assistant("hello"), user("more")]
AB = (assistant("a"), assistant("b"))
PAIR = {"chosen": "a", "rejected": "b"}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"x": 1}}}

TAKEN = {  # name: (format, row, prompt, answers, targets)
    "strings": ("pairs", {"prompt": "hi", **PAIR}, HI, AB, ()),
    "a system and a margin": (
        "pairs",
        {"system": "Be kind.", "prompt": "hi", **PAIR, "margin": 0.5},
        [system("Be kind."), *HI],
        AB,
        (0.5, 0.0),
    ),
    "a margin from CSV": ("pairs", {"prompt": "hi", **PAIR, "margin": "-2"}, HI, AB, (-2.0, 0.0)),
    "no margin in CSV": ("pairs", {"prompt": "hi", **PAIR, "margin": "", "system": ""}, HI, AB, ()),
    "messages throughout": (
        "pairs",
        {"prompt": LONG, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        LONG,
        AB,
        (),
    ),
    "one message each": (
        "pairs",
        {"prompt": HI, "chosen": assistant("a"), "rejected": assistant("b")},
        HI,
        AB,
        (),
    ),
    "whole conversations": (
        "pairs",
        {"chosen": [*LONG, assistant("a")], "rejected": [*LONG, assistant("b")]},
        LONG,
        AB,
        (),
    ),
    "whole conversations beside their prompt, never doubled": (
        "pairs",
        {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        HI,
        AB,
        (),
    ),
    "whole conversations beside their last question": (
        "pairs",
        {"prompt": "more\n", "chosen": [*LONG, assistant("a")], "rejected": [*LONG, assistant("b")]},
        LONG,
        AB,
        (),
    ),
    "a system beside whole conversations": (
        "pairs",
        {"system": "Be kind.", "chosen": [*LONG[1:], assistant("a")], "rejected": [*LONG, assistant("b")]},
        LONG,
        AB,
        (),
    ),
    "a conversation that goes on": (
        "pairs",
        {
            "prompt": "hi",
            "chosen": [assistant("x"), user("y"), assistant("a")],
            "rejected": [assistant("x"), user("y"), assistant("b")],
        },
        [*HI, assistant("x"), user("y")],
        AB,
        (),
    ),
    "sharegpt": (
        "pairs",
        {"conversations": [{"from": "system", "value": "S"}, human("hi")], "chosen": gpt("a"), "rejected": gpt("b")},
        [system("S"), *HI],
        AB,
        (),
    ),
    "sharegpt as JSON text": (
        "pairs",
        {"conversations": json.dumps([human("hi")]), "chosen": gpt("a"), "rejected": gpt("b")},
        HI,
        AB,
        (),
    ),
    "weighted parts": (
        "pairs",
        {
            "chosen_messages": [parts("user", "hi", 0.0), parts("assistant", "a", 1.0)],
            "rejected_messages": [parts("user", "hi", 0.0), parts("assistant", "b", 0.0)],
        },
        HI,
        AB,
        (),
    ),
    "alpaca": (
        "pairs",
        {"instruction": "Say", "input": "hi", "output": "o", "history": [["c", "d"]], **PAIR},
        [user("c"), assistant("d"), user("Say\nhi")],
        AB,
        (),
    ),
    "messages and answers": ("pairs", {"messages": LONG, **PAIR}, LONG, AB, ()),
    "a question": ("pairs", {"question": "hi", **PAIR}, HI, AB, ()),
    "after a tool's result": (
        "pairs",
        {"prompt": [*HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "5"}], **PAIR},
        [*HI, assistant("", tool_calls=[CALL]), {"role": "tool", "content": "5"}],
        AB,
        (),
    ),
    "a call against words": (
        "pairs",
        {"conversations": [human("hi")], "chosen": {"from": "function_call", "value": '{"name": "sum", "arguments":'
         ' {"x": 1}}'}, "rejected": gpt("b")},
        HI,
        (assistant("", tool_calls=[CALL]), assistant("b")),
        (),
    ),
    "transcripts": ("transcripts", {"chosen": hh("hi", "a"), "rejected": hh("hi", "b")}, HI, AB, ()),
    "transcripts of many turns and lines": (
        "transcripts",
        {
            "chosen": hh("hi", "see:\n\n1. Human: x\nAssistant: y", "more", " a\n"),
            "rejected": hh("hi ", "see:\n\n1. Human: x\nAssistant: y", "more", "b"),
        },
        [*HI, assistant("see:\n\n1. Human: x\nAssistant: y"), user("more")],
        AB,
        (),
    ),
    "ranked": ("ranked", {"prompt": "hi", "answers": ["a", "b", "c"]}, HI, (*AB, assistant("c")), ()),
    "ranked by scores inside": (
        "ranked",
        {"prompt": "hi", "answers": [{"text": "b", "score": 1}, {"content": "a", "score": 2.5}]},
        HI,
        AB,
        (),
    ),
    "ranked by ranks inside": (
        "ranked",
        {"messages": HI, "answers": [{"value": "b", "rank": 2}, {"value": "a", "rank": "1"}]},
        HI,
        AB,
        (),
    ),
    "ranked by a list of scores": (
        "ranked",
        {"prompt": "hi", "answers": ["b", "a"], "scores": [-1, 0]},
        HI,
        AB,
        (),
    ),
    "ranked by a list of ranks, from CSV": (
        "ranked",
        {"prompt": "hi", "answers": '["b", "a"]', "ranks": "[2, 1]"},
        HI,
        AB,
        (),
    ),
    "ranked by place, from CSV": (
        "ranked",
        {"prompt": "hi", "answers": '["a", "b"]', "scores": "", "ranks": ""},
        HI,
        AB,
        (),
    ),
    "ranked messages": (
        "ranked",
        {"conversations": [human("hi")], "answers": [gpt("a"), [user("hi"), assistant("b")]]},
        HI,
        AB,
        (),
    ),
    "ranked responses": ("ranked", {"question": "hi", "responses": ["a", "b"]}, HI, AB, ()),
    "labelled": ("labelled", {"prompt": "hi", "completion": "a", "label": True}, HI, AB[:1], (1.0,)),
    "labelled messages": (
        "labelled",
        {"messages": [*LONG, assistant("a")], "label": False},
        LONG,
        AB[:1],
        (0.0,),
    ),
    "labelled sharegpt": (
        "labelled",
        {"conversations": [human("hi"), gpt("a")], "system": "S", "label": "undesirable"},
        [system("S"), *HI],
        AB[:1],
        (0.0,),
    ),
    "labelled alpaca, as LLaMA-Factory has it": (
        "labelled",
        {"instruction": "hi", "input": "", "output": "a", "kto_tag": "false"},
        HI,
        AB[:1],
        (0.0,),
    ),
    "ranked outputs, as LLaMA-Factory has them": (
        "ranked",
        {"instruction": "hi", "input": "", "output": ["a", "b"]},
        HI,
        AB,
        (),
    ),
    "assistants in a row": (
        "transcripts",
        {"chosen": hh("hi", "c") + "\n\nAssistant: a", "rejected": hh("hi", "c") + "\n\nAssistant: b"},
        [*HI, assistant("c")],
        AB,
        (),
    ),
    "users in a row": ("pairs", {"prompt": [user("x"), *HI], **PAIR}, [user("x"), *HI], AB, ()),
    "an assistant first, repeated in the answers": (
        "pairs",
        {"prompt": [assistant("c"), *HI], "chosen": [assistant("c"), *HI, AB[0]], "rejected": "b"},
        [assistant("c"), *HI],
        AB,
        (),
    ),
    "labelled lists": (
        "labelled",
        {"prompt": HI, "completion": [assistant("a")], "label": 1},
        HI,
        AB[:1],
        (1.0,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_a_row_becomes_a_prompt_and_its_answers(name):
    format, row, prompt, answers, targets = TAKEN[name]
    assert convert(row, format, "rows", 7, ALL) == Row("rows", 7, prompt, None, None, (), answers, targets)


@pytest.mark.parametrize("name", TAKEN)
def test_detection_finds_the_format(name):
    format, row, *_ = TAKEN[name]
    assert detect([row], ALL)[0] == format


@pytest.mark.parametrize(
    "label", [True, 1, 1.0, "true", "True", " desirable", "+1", "1", "01", "1.0", "Good", "chosen"]
)
def test_labels_that_say_yes(label):
    assert convert({"prompt": "q", "completion": "a", "label": label}, "labelled", "f", 1, ALL).targets == (1.0,)


@pytest.mark.parametrize("label", [False, 0, -1, 0.0, "false", "FALSE", "undesirable", "-1", "0", "-1.0", "bad", "no"])
def test_labels_that_say_no(label):
    assert convert({"prompt": "q", "completion": "a", "label": label}, "labelled", "f", 1, ALL).targets == (0.0,)


REPAIRED = [  # format, row, repairs, answers
    (
        "pairs",
        {"system": " ", "prompt": "q", "chosen": "a", "rejected": "b"},
        ("left out system: an empty system turn",),
        "ab",
    ),
    (
        "pairs",
        {"prompt": "Tell me a joke.", "chosen": "Tell me a joke. a", "rejected": "Tell me a joke.\nb"},
        ("cut off the prompt, which the answers repeated",),
        "ab",
    ),
    (
        "ranked",
        {"prompt": "讲个笑话。", "answers": ["讲个笑话。a", "讲个笑话。b"]},
        ("cut off the prompt, which the answers repeated",),
        "ab",
    ),
    (
        "ranked",
        {"prompt": "q", "answers": ["c", "a", "b", "a"], "scores": [1, 3, 1, 2]},
        ("left out answers[3]: the same as answers[1]", "left out answers[2]: as good as answers[0]"),
        "ac",
    ),
]


@pytest.mark.parametrize(("format", "row", "repairs", "answers"), REPAIRED)
def test_repairs_are_told(format, row, repairs, answers):
    made = convert(row, format, "f", 1, ALL)
    assert made.repairs == repairs
    assert made.answers == tuple(map(assistant, answers))
    assert made.messages == [user(row["prompt"])]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", "Hi there", "Hi friend"),  # a greeting answered with a greeting
        ("Once upon", "Once upon a time", "Never"),
        ("It is on", "It is one", "It is only"),
        ("It is on", "It is on", "It is on top"),
    ],
)
def test_answers_that_only_begin_like_the_prompt_stay(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert convert(row, "pairs", "f", 1, ALL).answers == (assistant(chosen), assistant(rejected))


SAME = "rejected: expected the same turns as chosen before the last, found them to part at turn"

REFUSED = [
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": " a\n"}, "rejected: expected another answer than chosen"),
    ("pairs", {"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: expected text, found an empty text"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: expected text, found only white space"),
    ("pairs", {"prompt": "q", "chosen": "a"}, "rejected: expected text, found nothing"),
    ("pairs", {"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen: expected text, found the number 3"),
    ("pairs", {"prompt": "q", "chosen": {"x": 1}, "rejected": "b"}, "chosen: expected a text, a message or an object"),
    ("pairs", {"prompt": "q", "chosen": [], "rejected": "b"}, "chosen: expected a list of turns, found the list []"),
    ("pairs", PAIR, "prompt: expected one of the columns prompt, conversations, messages, instruction"),
    ("pairs", {"prompt": " ", **PAIR}, "prompt: expected text, found only white space"),
    ("pairs", {"prompt": "q", **PAIR, "margin": "wide"}, "margin: expected a finite number, found the text 'wide'"),
    ("pairs", {"prompt": "q", **PAIR, "margin": float("nan")}, "margin: expected a finite number, found the number"),
    ("pairs", {"prompt": "q", **PAIR, "margin": float("inf")}, "margin: expected a finite number, found the number"),
    ("pairs", {"prompt": "q", **PAIR, "margin": -1e39}, "margin: expected a finite number, found the number"),
    ("pairs", {"prompt": "q", **PAIR, "margin": True}, "margin: expected a finite number, found True"),
    ("pairs", {"prompt": LONG[:3], **PAIR}, "prompt[2].role: expected user or tool before the answer, found assistant"),
    ("pairs", {"prompt": LONG[:1], **PAIR}, "prompt: expected one of the columns prompt, conversations, messages"),
    (
        "pairs",
        {"prompt": "hi", "chosen": [assistant("a", weight=0)], "rejected": "b"},
        "chosen[0].role: this answer is marked as not to be learnt",
    ),
    ("pairs", {"prompt": "hi", "chosen": [system("")], "rejected": "b"}, "chosen: expected an assistant's answer"),
    ("pairs", {"prompt": "hi", **PAIR, "images": ["a.png"]}, "images: only text can be learnt"),
    (
        "pairs",
        {"conversations": [human("q")], "chosen": human("a"), "rejected": gpt("b")},
        "chosen.from: expected an assistant's answer, found user",
    ),
    (
        "pairs",
        {"chosen": [*HI, assistant("a"), user("c")], "rejected": [*HI, assistant("b")]},
        "chosen[2].role: expected an assistant's answer, found user",
    ),
    ("pairs", {"chosen": [user("a"), *AB[:1]], "rejected": [user("b"), *AB[1:]]}, f"{SAME} 1 of 2"),
    ("pairs", {"chosen": [*LONG, AB[0]], "rejected": [*LONG[:2], AB[1], LONG[3], AB[1]]}, f"{SAME} 3 of 5"),
    ("pairs", {"chosen": [*LONG, AB[0]], "rejected": LONG[:3]}, f"{SAME} 4 of 5"),
    ("pairs", {"chosen": LONG[:3], "rejected": [*LONG, AB[0]]}, f"{SAME} 4 of 5"),
    (
        "pairs",
        {"prompt": "other", "chosen": [*HI, AB[0]], "rejected": [*HI, AB[1]]},
        "chosen[0].content: expected the turns of the prompt before the answer, found others",
    ),
    (
        "pairs",
        {"system": "S", "chosen": [*LONG, AB[0]], "rejected": [*LONG, AB[1]]},
        "chosen[0].content: expected the turns of the prompt before the answer, found others",
    ),
    ("transcripts", {"chosen": hh("q", ""), "rejected": hh("q", "b")}, "chosen, turn 2: expected text, found an empty"),
    (
        "transcripts",
        {"chosen": hh("q", "a"), "rejected": "\n\nHuman: q\n\nAssistant:"},
        "rejected, turn 2: expected text, found an empty text",
    ),
    (
        "transcripts",
        {"chosen": hh("q", "a", "r"), "rejected": hh("q", "b")},
        "chosen, turn 3: expected an assistant's answer, found user",
    ),
    ("transcripts", {"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "b", "r", "a")}, f"{SAME} 2 of 4"),
    ("transcripts", {"chosen": "a", "rejected": "b"}, "chosen: expected a transcript that begins with Human:"),
    ("transcripts", {"chosen": f"So: {hh('q', 'a')}", "rejected": "b"}, "chosen: expected a transcript that begins"),
    ("transcripts", {"chosen": hh("q", "a")}, "rejected: expected a transcript that begins with Human:, found nothing"),
    ("ranked", {"prompt": "q", "answers": ["a"]}, "answers: expected two or more, found 1"),
    ("ranked", {"prompt": "q", "answers": "a b"}, "answers: expected JSON, found the text 'a b'"),
    ("ranked", {"prompt": "q", "answers": {"a": 1}}, "answers: expected a list of answers, found the object"),
    (
        "ranked",
        {"prompt": "q", "answers": ["a", "b"], "ranks": [1, 1]},
        "answers: expected two or more, found 2, with 1 left after ties and repetitions",
    ),
    ("ranked", {"prompt": "q", "answers": ["a", "b"], "scores": [1]}, "scores: expected a list of 2 numbers, one an"),
    ("ranked", {"prompt": "q", "answers": ["a", "b"], "scores": [1, "x"]}, "scores[1]: expected a finite number"),
    (
        "ranked",
        {"prompt": "q", "answers": [{"text": "a", "score": 1}, {"text": "b"}]},
        "answers[1].score: expected a finite number, found nothing",
    ),
    ("ranked", {"prompt": "q", "answers": ["a", ""]}, "answers[1]: expected text, found an empty text"),
    ("ranked", {"answers": ["a", "b"]}, "prompt: expected one of the columns"),
    ("labelled", {"prompt": "q", "completion": "a"}, "label: expected true or false, 1 or 0 or -1, desirable"),
    ("labelled", {"prompt": "q", "completion": "a", "label": 0.5}, "label: expected true or false"),
    ("labelled", {"prompt": "q", "completion": "a", "label": "spam"}, "label: expected true or false, 1 or 0 or"),
    ("labelled", {"prompt": "q", "completion": "a", "label": 7}, "label: expected true or false, 1 or 0 or -1, des"),
    ("labelled", {"prompt": "q", "completion": "a", "kto_tag": "spam"}, "kto_tag: expected true or false, 1 or 0"),
    ("labelled", {"prompt": "q", "completion": "a", "kto_tag": None}, "kto_tag: expected true or false, 1 or 0"),
    ("labelled", {"prompt": "q", "completion": "a", "kto_tag": True, "label": "spam"}, "label: expected true or fals"),
    (
        "labelled",
        {"prompt": "q", "completion": "a", "label": True, "kto_tag": False},
        "label and kto_tag: one calls the answer good, the other bad",
    ),
    ("labelled", {"prompt": "q", "label": True}, "completion: expected text, found nothing"),
    ("labelled", {"messages": LONG, "label": True}, "messages[3].role: expected an assistant's answer, found user"),
    ("labelled", {"messages": [AB[0]], "label": True}, "prompt: expected one of the columns"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "reason"), REFUSED)
def test_a_fault_says_where_and_why(format, row, reason):
    fault = convert(row, format, "rows", 3, ALL)
    assert isinstance(fault, Fault)
    assert fault[:2] == ("rows", 3)
    assert fault.reason.startswith(reason)


@pytest.mark.parametrize("name", [name for name, (format, *_) in TAKEN.items() if format in BEST])
def test_a_stage_that_learns_from_one_answer_takes_the_best(name):
    format, row, prompt, answers, _ = TAKEN[name]
    formats = conversations("assistant").formats
    found, why = detect([row], formats)
    assert found == format, "never as the conversation that its prompt is"
    assert "; the best answer is learnt" in why
    context = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in prompt]
    assert convert(row, found, "f", 1, formats) == Row("f", 1, [*context, answers[0]], None, None)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [*HI, AB[0]], "label": True}, "messages"),
        ({"text": "Human: hi", "label": 1}, "text"),
        ({"instruction": "i", "output": "o", "answers": ["a", "b"]}, "ranked"),
        ({"text": "a", "answers": "b"}, "text"),
    ],
)
def test_what_conversations_take_such_rows_for(row, format):
    assert detect([row], conversations("assistant").formats)[0] == format


def test_detection_says_what_is_wanted():
    format, why = detect([{"messages": HI}], preferences().formats)
    assert format is None
    assert "pairs needs `chosen`, `rejected`; " in why
    assert "ranked needs `answers` and one of `prompt`, `conversations`, `messages`, `instruction`" in why
    assert "with `Human:" not in why
    assert "transcripts needs `chosen`, `rejected` with Human:/Assistant:" in why
    assert detect([{"text": "a", "label": "ham"}], labelled().formats)[0] is None


def test_columns_of_the_file_are_named_and_can_be_mapped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"ask": "hi", "good": "a", "bad": "b"}))
    source = Source(path=str(path), columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    (row,) = read_rows(source, preferences().formats)
    assert (row.messages, row.answers) == (HI, AB)
    path.write_text(json.dumps({"question": "hi", "responses": ["a", "b"]}))
    (found,) = find(Source(path=str(path)), preferences().formats)
    assert found.why == "columns `responses`, `question`"


@pytest.mark.parametrize(
    ("name", "reading", "format", "count"),
    [
        ("pairs.jsonl", preferences(), "pairs", 60),
        ("transcripts.jsonl", preferences(), "transcripts", 5),
        ("ranked.jsonl", preferences(), "ranked", 8),
        ("labelled.jsonl", labelled(), "labelled", 16),
    ],
)
def test_templates_load_as_they_stand(name, reading, format, count):
    source = Source(path=str(TEMPLATES / name))
    assert [found.format for found in find(source, reading.formats)] == [format]
    rows = list(read_rows(source, reading.formats))
    assert len(rows) == count
    assert all(isinstance(row, Row) and not row.repairs for row in rows)
    assert len({json.dumps(row[2:], default=list) for row in rows}) == count
    assert 0.2 < sum(json.dumps(row.messages, ensure_ascii=False).isascii() for row in rows) / count < 0.9


def assert_canonical(row: Row, format: str) -> None:
    """The invariants that rendering builds on."""
    json.dumps(row, ensure_ascii=False).encode()
    assert row.text is None
    assert any(message["role"] != "system" for message in row.messages)
    assert all(message["content"].strip() or message.get("tool_calls") for message in row.messages)
    assert {answer["role"] for answer in row.answers} == {"assistant"}
    said = [(answer["content"].strip(), json.dumps(answer.get("tool_calls"))) for answer in row.answers]
    assert all(words or calls != "null" for words, calls in said)
    assert all("train" not in message for message in (*row.messages, *row.answers))
    if format == "labelled":
        assert len(said) == 1
        assert row.targets in ((0.0,), (1.0,))
    else:
        assert len(said) >= 2
        assert row.targets == () or (len(said) == 2 and row.targets[1] == 0.0)


@settings(max_examples=often(1500), deadline=None)
@given(mutated(TAKEN, ALL))
def test_fuzz_only_canonical_rows_or_faults_come_out(case):
    format, row = case
    result = convert(row, format, "f", 1, ALL)
    if isinstance(result, Row):
        assert_canonical(result, format)
    else:
        assert isinstance(result, Fault)
        assert result.reason


@settings(max_examples=500, deadline=None)
@given(mutated(TAKEN, ALL))
def test_fuzz_detection_never_fails(case):
    _, row = case
    for formats in (COMPARED, JUDGED, {**BEST, **FORMATS}):
        if isinstance(row, dict):
            assert detect([row], formats)[1]
