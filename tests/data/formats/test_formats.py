"""Rows of every format, worked by hand; every reason to refuse one; and thousands of mutated rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from data.mutants import mutated
from hypothesis import given, settings
from often import often

from align.data.formats.formats import FORMATS, Fault, Row, convert, describe, detect, read_rows
from align.recipe.errors import UserError
from align.recipe.schema import Source

TEMPLATES = Path(__file__).parents[3] / "data_templates"


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def call(function, **arguments):
    return {"type": "function", "function": {"name": function, "arguments": arguments}}


def said(*turns):
    """A sharegpt row from (from, value) pairs."""
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


HI = [user("hi"), assistant("hello")]
SUM = {"name": "sum", "parameters": {}}

TAKEN = {
    "alpaca": ("alpaca", {"instruction": "hi", "input": "", "output": "hello"}, HI),
    "alpaca with everything": (
        "alpaca",
        {"instruction": "And", "input": "now?", "output": "5", "system": "Add.", "history": [["1+1", "2"]]},
        [system("Add."), user("1+1"), assistant("2"), user("And\nnow?"), assistant("5")],
    ),
    "alpaca history as JSON, as in CSV": (
        "alpaca",
        {"instruction": "c", "output": "d", "history": '[["a", "b"]]', "input": None, "system": None},
        [user("a"), assistant("b"), user("c"), assistant("d")],
    ),
    "sharegpt": ("sharegpt", said(("human", "hi"), ("gpt", "hello")), HI),
    "sharegpt with a system column": (
        "sharegpt",
        {**said(("user", "hi"), ("chatgpt", "hello")), "system": "Be kind."},
        [system("Be kind."), *HI],
    ),
    "sharegpt tool calls": (
        "sharegpt",
        said(
            ("human", "2+3?"),
            ("function_call", '{"name": "sum", "arguments": {"a": 2, "b": 3}}'),
            ("observation", "5"),
            ("gpt", "Five."),
        ),
        [user("2+3?"), assistant("", tool_calls=[call("sum", a=2, b=3)]), tool("5"), assistant("Five.")],
    ),
    "sharegpt, two calls at once, the arguments as JSON text": (
        "sharegpt",
        said(
            ("human", "?"),
            ("function_call", '[{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": {"x": 1}}]'),
            ("observation", "1"),
            ("function_response", "2"),
            ("gpt", "3"),
        ),
        [
            user("?"),
            assistant("", tool_calls=[call("f"), call("g", x=1)]),
            tool("1"),
            tool("2"),
            assistant("3"),
        ],
    ),
    "messages": ("messages", {"messages": HI}, HI),
    "messages, developer and function, ids and null content": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Add."},
                user("2+3?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 2}'}}
                    ],
                },
                {"role": "function", "name": "sum", "tool_call_id": "c1", "content": "5"},
                {"role": "assistant", "content": "Five.", "refusal": None, "tool_calls": None},
            ]
        },
        [
            system("Add."),
            user("2+3?"),
            assistant("", tool_calls=[{"id": "c1", **call("sum", a=2)}]),
            tool("5", name="sum", tool_call_id="c1"),
            assistant("Five."),
        ],
    ),
    "messages in parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "Add."},
                        {"type": "tool_call", "value": '{"name": "sum", "arguments": {"a": 2}}'},
                    ],
                },
                {"role": "tool", "content": [{"type": "text", "value": "5"}]},
                assistant("Five.", reasoning_content="Done."),
            ]
        },
        [
            user("2+3?"),
            assistant("", reasoning_content="Add.", tool_calls=[call("sum", a=2)]),
            tool("5"),
            assistant("Five.", reasoning_content="Done."),
        ],
    ),
    "messages with weights": (
        "messages",
        {
            "messages": [
                user("a") | {"loss_weight": 0.0},
                assistant("b", loss_weight=0.0),
                user("c"),
                assistant("d", loss_weight=1.0),
            ]
        },
        [user("a"), assistant("b", train=False), user("c"), assistant("d")],
    ),
    "prompt_completion": ("prompt_completion", {"prompt": "hi", "completion": "hello"}, HI),
    "prompt_completion of messages": (
        "prompt_completion",
        {"prompt": [system("s"), user("a"), assistant("b"), user("hi")], "completion": [assistant("hello")]},
        [system("s"), user("a"), assistant("b", train=False), *HI],
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_row_becomes_canonical(name):
    format, row, expected = TAKEN[name]
    assert convert(row, format, "rows", 7) == Row("rows", 7, expected, None, None)


@pytest.mark.parametrize("name", TAKEN)
def test_detection_finds_the_format(name):
    format, row, _ = TAKEN[name]
    assert detect([row])[0] == format


def test_text():
    assert convert({"text": " a b\n"}, "text", "f", 1) == Row("f", 1, None, " a b\n", None)


@pytest.mark.parametrize("given", [[SUM], SUM, [{"type": "function", "function": SUM}]])
@pytest.mark.parametrize("as_json", [True, False])
def test_tools_are_wrapped_once(given, as_json):
    row = {"messages": HI, "tools": json.dumps(given) if as_json else given}
    assert convert(row, "messages", "f", 1).tools == [{"type": "function", "function": SUM}]


@pytest.mark.parametrize("empty", [None, "", [], "[]"])
def test_no_tools(empty):
    assert convert({"messages": HI, "tools": empty}, "messages", "f", 1).tools is None


@pytest.mark.parametrize("where", ["tools", "calls", "calls in JSON"])
def test_what_is_nested_too_deeply_is_a_fault(where):
    """Before it comes to those that walk it by recursion. JSON itself may be nested some 900 deep."""
    for depth, taken in ((50, True), (600, False)):
        deep = []
        for _ in range(depth):
            deep = [deep]
        function = {"name": "sum", "arguments": {"x": deep}}
        if where == "calls in JSON":
            function["arguments"] = json.dumps(function["arguments"])
        turn = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        tools = {"tools": [SUM | {"parameters": {"x": deep}}]} if where == "tools" else {}
        row = convert({"messages": [*HI, turn] if not tools else HI} | tools, "messages", "f", 1)
        assert isinstance(row, Row) == taken, row
        assert taken or row.reason == "expected a row nested at most 100 deep, found a deeper one"


def test_turns_after_the_last_answer_are_cut_and_told():
    row = said(("human", "hi"), ("gpt", "hello"), ("human", "bye"))
    assert convert(row, "sharegpt", "f", 1) == Row(
        "f", 1, HI, None, None, ("cut 1 turn after the last assistant turn",)
    )
    row = said(("human", "hi"), ("gpt", "hello"), ("human", "one"), ("human", ""))
    assert convert(row, "sharegpt", "f", 1).repairs == ("cut 2 turns after the last assistant turn",)


CALL = {"role": "assistant", "content": None, "tool_calls": [call("sum")]}

REFUSED = [
    ("messages", {}, "messages: expected a list of turns, found nothing"),
    ("messages", {"messages": []}, "messages: expected a list of turns, found the list []"),
    ("messages", {"messages": "hi"}, "messages: expected JSON, found the text 'hi'"),
    ("messages", {"messages": [3]}, "messages[0]: expected `role` and `content`, found the number 3"),
    (
        "messages",
        {"messages": [user("hi")]},
        "messages: expected an assistant turn to learn from, found none",
    ),
    ("messages", {"messages": HI, "system": 3}, "system: expected text, found the number 3"),
    ("messages", {"messages": [user(""), HI[1]]}, "messages[0].content: expected text, found an empty text"),
    (
        "messages",
        {"messages": [HI[0], assistant(" \n")]},
        "messages[1].content: expected text, found only white",
    ),
    ("messages", {"messages": [HI[0], assistant(None)]}, "messages[1].content: expected text, found nothing"),
    ("messages", {"messages": [user(5), HI[1]]}, "messages[0].content: expected text, found the number 5"),
    ("messages", {"messages": [HI[0], assistant("\ud800")]}, "messages: cannot be written as JSON in UTF-8"),
    (
        "messages",
        {"messages": [HI[0], {"role": "asistant", "content": "b"}]},
        "messages[1].role: unknown role 'asistant'; did you mean 'assistant'?",
    ),
    ("messages", {"messages": [HI[0], tool("5"), HI[1]]}, "messages[1].role: this tool turn answers no call"),
    (
        "messages",
        {"messages": [HI[0], CALL, HI[1]]},
        "messages[2].role: expected tool after a tool call, found assistant",
    ),
    (
        "messages",
        {"messages": [HI[0] | {"tool_calls": [call("f")]}, HI[1]]},
        "messages[0].tool_calls: only an assistant",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant("b", reasoning_content="c", thinking="d")]},
        "messages[1]: reasoning_content and thinking differ",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant("b", loss="maybe")]},
        "messages[1].loss: expected 0 or 1, true or false",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant("b", loss=True, ignore=1)]},
        "messages[1]: loss and ignore contradict each other",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant("b", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]},
        "messages[1].train_detail: parts of a turn cannot be marked",
    ),
    (
        "messages",
        {"messages": [{"role": "system", "text": "a"}, *HI]},
        "messages[0].content: expected text, found nothing; its",
    ),
    ("messages", {"messages": HI, "loss_mask": [0]}, "loss_mask: expected a list of 2 marks, one a turn"),
    ("messages", {"messages": HI, "loss_mask": [0, 2]}, "loss_mask[1]: expected 0 or 1"),
    ("messages", {"messages": HI, "loss_mask": 0}, "loss_mask: expected a list of 2 marks, one a turn"),
    (
        "messages",
        {"messages": [HI[0], assistant([{"type": "text", "text": "b", "train": False}])]},
        "messages[1].content[0].train: parts of a turn cannot be marked",
    ),
    (
        "messages",
        {"messages": HI, "Images": ["a.png"]},
        "Images: only text can be learnt, and this row refers to images",
    ),
    ("messages", {"messages": HI, "imageUrl": "a.png"}, "imageUrl: only text can be learnt"),
    ("messages", {"messages": HI, "img": "a.png"}, "img: only text can be learnt, and this row refers to images"),
    ("messages", {"messages": HI, "frame 1": {"bytes": b"x"}}, "frame 1: only text can be learnt"),
    (
        "messages",
        {"messages": HI, "mm_data": {"x": "a.png"}},
        "mm_data: only text can be learnt, and this row refers to",
    ),
    ("messages", {"messages": HI, "Photo": "a.png"}, "Photo: only text can be learnt, and this row refers to images"),
    ("messages", {"messages": HI, "takes": [{"bytes": None, "path": "a.wav"}]}, "takes: only text can be learnt"),
    (
        "messages",
        {"messages": HI, "images": ["a.png"]},
        "images: only text can be learnt, and this row refers to images",
    ),
    ("messages", {"messages": [user("a") | {"audio": "a.wav"}, HI[1]]}, "messages[0].audio: only text can be learnt"),
    ("messages", {"messages": HI, "label": "spam"}, "label: expected true or false, 1 or 0 or -1"),
    ("messages", {"messages": HI, "kto_tag": float("nan")}, "kto_tag: expected true or false, 1 or 0 or -1"),
    (
        "messages",
        {"messages": [HI[0], assistant(None, tool_calls=[{"name": "f", "arguments": {"x": float("nan")}}])]},
        "messages: cannot be written as JSON in UTF-8",
    ),
    (
        "messages",
        {"messages": [{"speaker": "user", "text": "a"}, HI[1]]},
        "messages[0].role: expected text, found nothing; its",
    ),
    (
        "messages",
        {"messages": [{"role": "customer", "content": "a"}, HI[1]]},
        "messages[0].role: unknown role 'customer'; say in the recipe",
    ),
    (
        "messages",
        {"messages": [HI[0], CALL, *HI]},
        "messages[2].role: expected tool after a tool call, found user",
    ),
    (
        "messages",
        {"messages": [HI[0], CALL, tool("1"), tool("2"), HI[1]]},
        "messages[3].role: this tool turn answers no call",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant(None, tool_calls=[{"name": "f", "arguments": "{a"}])]},
        "messages[1].tool_calls[0].arguments: expected JSON, found the text '{a'",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant(None, tool_calls=[{"name": "f", "arguments": "[]"}])]},
        "messages[1].tool_calls[0].arguments: expected an object, found the list []",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant([{"type": "image_url"}])]},
        "messages[1].content[0].type: only text can be learnt, and this row refers to images",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant("b", loss_weight=0.5)]},
        "messages[1].loss_weight: expected 0 or 1",
    ),
    (
        "messages",
        {"messages": [user("a") | {"loss_weight": 1}, HI[1]]},
        "messages[0].loss_weight: only assistant turns are trained, found the number 1 on a user turn",
    ),
    (
        "messages",
        {"messages": [HI[0], assistant("b", loss_weight=0)]},
        "messages[1].content: every assistant turn is marked as context",
    ),
    ("messages", {"messages": HI, "tools": [{"x": 1}]}, "tools[0]: expected a function with a `name`"),
    ("messages", {"messages": HI, "tools": "{"}, "tools: expected JSON, found the text '{'"),
    (
        "sharegpt",
        said(("human", "a"), ("gpt", "")),
        "conversations[1].value: expected text, found an empty text",
    ),
    ("sharegpt", said(("human", "a"), ("function_call", "sum")), "conversations[1].value: expected JSON"),
    ("sharegpt", {"conversations": [{"from": "human"}, HI[1]]}, "conversations[0].role: expected text, found nothing"),
    ("alpaca", {"instruction": "a", "output": None}, "output: expected text, found nothing"),
    ("alpaca", {"instruction": "", "output": "b"}, "instruction: expected text, found an empty text"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0]: expected [question, answer]",
    ),
    ("prompt_completion", {"prompt": "a", "completion": 3}, "completion: expected text, found the number 3"),
    (
        "prompt_completion",
        {"prompt": "a", "completion": HI},
        "completion[0].role: expected the assistant's answer to the prompt, found user",
    ),
    (
        "prompt_completion",
        {"prompt": HI, "completion": "there"},
        "prompt[1].role: expected user or tool before the answer, found assistant",
    ),
    ("text", {"text": " "}, "text: expected text, found only white space"),
    ("text", ["text"], "expected a row of named columns, found the list ['text']"),
]


@pytest.mark.parametrize(("format", "row", "reason"), REFUSED, ids=[reason for *_, reason in REFUSED])
def test_a_fault_says_where_and_why(format, row, reason):
    fault = convert(row, format, "rows", 3)
    assert isinstance(fault, Fault)
    assert fault[:2] == ("rows", 3)
    assert fault.reason.startswith(reason)


def test_detection_names_the_other_formats_that_fit():
    format, why = detect([{"instruction": "a", "output": "b", "text": "ab"}])
    assert format == "alpaca"
    assert "it could be text too" in why


@pytest.mark.parametrize("row", [{"question": "a", "answer": "b"}, {"messages": "no JSON"}, {}])
def test_detection_says_why_it_cannot_tell(row):
    format, why = detect([row])
    assert format is None
    assert all(name in why for name in (*row, *FORMATS, "name the format"))


def write(folder: Path, name: str, *rows) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


QA = {"question": "hi", "answer": "hello", "prompt": "not this"}


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path, "qa.jsonl", QA)
    source = Source(path=path, columns={"prompt": "question", "completion": "answer"})
    assert list(read_rows(source)) == [Row(path, 1, HI, None, None)]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ("no format fits its columns `question`, `answer`, `prompt`", "columns: {<the format's name>")),
        (
            {"format": "alpaca"},
            ("needs `instruction`, `output`", "has `question`, `answer`, `prompt`", "map"),
        ),
        ({"columns": {"prompt": "qestion"}}, ("no column 'qestion'", "did you mean 'question'?")),
        ({"columns": {"promt": "question"}}, ("unknown 'promt'", "did you mean 'prompt'?")),
        ({"format": "text", "columns": {"prompt": "question"}}, ("unknown 'prompt'; expected `text`",)),
    ],
)
def test_columns_that_do_not_match(tmp_path, options, parts):
    path = write(tmp_path, "qa.jsonl", QA)
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path=path, **options)))
    assert caught.value.problems[0].startswith(f"{path}: ")
    assert all(part in str(caught.value) for part in parts)


def test_every_problem_of_a_folder_at_once(tmp_path):
    write(tmp_path, "a.jsonl", {"x": 1})
    write(tmp_path, "b.jsonl", {"text": "fine"})
    write(tmp_path, "c.jsonl")
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path=str(tmp_path))))
    assert [problem.split(": ")[0][-7:] for problem in caught.value.problems] == ["a.jsonl", "c.jsonl"]


def test_limit_counts_rows_over_all_files(tmp_path):
    write(tmp_path, "a.jsonl", {"text": "1"}, {"text": ""})
    write(tmp_path, "b.jsonl", {"text": "3"}, {"text": "4"})
    rows = list(read_rows(Source(path=str(tmp_path), limit=3)))
    assert [(Path(row.file).name, row.line) for row in rows] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 1),
    ]


def test_describe_names_files_and_formats(tmp_path):
    write(tmp_path, "a.jsonl", said(("human", "hi"), ("gpt", "hello")))
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    assert describe(Source(path=str(tmp_path))).splitlines() == [
        f"{tmp_path}/a.jsonl: sharegpt (column `conversations` with from/value)",
        f"{tmp_path}/b.txt: text (documents parted by blank lines)",
    ]


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("alpaca.json", "alpaca", 22),
        ("chat.jsonl", "sharegpt", 176),
        ("messages.jsonl", "messages", 10),
        ("prompt_completion.csv", "prompt_completion", 12),
        ("text.txt", "text", 10),
    ],
)
def test_templates_load_as_they_stand(name, format, count):
    source = Source(path=str(TEMPLATES / name))
    assert describe(source).startswith(f"{source.path}: {format} ")
    rows = list(read_rows(source))
    assert len(rows) == count
    assert all(isinstance(row, Row) and not row.repairs for row in rows)
    firsts = [row.text or json.dumps([m for m in row.messages if m["role"] == "user"]) for row in rows]
    assert len(set(firsts)) == count


def assert_canonical(row: Row) -> None:
    """The invariants that rendering builds on."""
    assert (row.messages is None) != (row.text is None)
    json.dumps(row, ensure_ascii=False).encode()
    if row.text is not None:
        assert row.text.strip()
        return
    roles = [message["role"] for message in row.messages]
    assert roles[-1] == "assistant"
    shown = "".join("c" if m.get("tool_calls") else m["role"][0] for m in row.messages)
    assert not re.search(r"(?<![ct])t|c[^ct]", shown)  # results follow calls, and calls that are not last have results
    for message in row.messages:
        assert isinstance(message["content"], str)
        assert message["content"].strip() or message.get("tool_calls")
        assert message["role"] == "assistant" or not message.keys() & {"tool_calls", "train"}
        for made in message.get("tool_calls", ()):
            assert isinstance(made["function"]["name"], str)
            assert isinstance(made["function"]["arguments"], dict)
    assert any(m["role"] == "assistant" and m.get("train", True) for m in row.messages)


@settings(max_examples=often(3000), deadline=None)
@given(mutated(TAKEN, FORMATS))
def test_fuzz_only_canonical_rows_or_faults_come_out(case):
    format, row = case
    result = convert(row, format, "f", 1)
    if isinstance(result, Row):
        assert_canonical(result)
    else:
        assert isinstance(result, Fault)
        assert result.reason


GOOD = (True, "true", "True", 1, 1.0, "1", "desirable", "good", None, "")
BAD = (False, "false", "False", 0, 0.0, "0", -1, "-1", -1.0, "undesirable", "bad", "no")


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row", [{"messages": HI}, {"prompt": "Hi!", "completion": "Go."}, {"instruction": "a", "output": "b"}]
)
def test_an_answer_marked_as_undesirable_is_not_learnt(row, column):
    format = detect([row])[0]
    for label in GOOD:
        assert isinstance(convert(row | {column: label}, format, "f", 1), Row), label
    for label in BAD:
        fault = convert(row | {column: label}, format, "f", 1)
        assert "marks the answer as undesirable" in fault.reason, label
        assert fault.reason.startswith(f"{column}: ")


MARKS_OFF = {
    "loss": False,
    "loss_mask": 0,
    "weight": 0.0,
    "train": "false",
    "loss_scale": "0",
    "masked": True,
    "ignore": "1",
}
MARKS_ON = {"loss": True, "loss_mask": 1, "weight": 1.0, "train": "True", "masked": False, "mask": 0, "training": None}


@pytest.mark.parametrize("key", MARKS_OFF)
def test_a_turn_marked_as_not_to_be_learnt_is_context(key):
    row = {"messages": [user("a"), assistant("b", **{key: MARKS_OFF[key]}), *HI]}
    made = convert(row, "messages", "f", 1)
    assert [m.get("train", True) for m in made.messages if m["role"] == "assistant"] == [False, True]
    assert made.remarks == ()


@pytest.mark.parametrize("key", MARKS_ON)
def test_a_turn_marked_as_to_be_learnt_is_learnt(key):
    row = {"messages": [user("a"), assistant("b", **{key: MARKS_ON[key]})]}
    made = convert(row, "messages", "f", 1)
    assert (made.messages, made.remarks) == ([user("a"), assistant("b")], ())


def test_a_list_of_marks_beside_the_turns():
    row = {"messages": [user("a"), assistant("b"), *HI], "loss_mask": [0, 0, 0, 1]}
    assert convert(row, "messages", "f", 1).messages == [user("a"), assistant("b", train=False), *HI]


def test_keys_that_nothing_reads_are_remarked():
    row = {"messages": [user("a") | {"mood": "glad", "id": 3, "name": None}, assistant("b", mood="sad", refusal=None)]}
    assert convert(row, "messages", "f", 1).remarks == (
        "nothing reads the key `mood` of a turn",
        "nothing reads the key `id` of a turn",
    )


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": HI}),
        ("prompt_completion", {"prompt": "a", "completion": "b"}),
        ("alpaca", {"instruction": "a", "output": "b"}),
    ],
)
def test_thoughts_in_a_column_of_their_own_are_remarked(format, row):
    (remark,) = convert(row | {"reasoning": "so", "thinking": None}, format, "f", 1).remarks
    assert remark.startswith("nothing reads the column `reasoning`; thoughts are read from a key `reasoning_content`")


def test_marks_in_columns_of_their_own_are_remarked():
    """Nothing reads them: they stand beside turns, and a row's other columns may say anything."""
    (remark,) = convert({"messages": HI, "weight": 0, "loss": "smooth"}, "messages", "f", 1).remarks
    assert remark.startswith(
        "nothing reads the column `weight`; a turn that is not to be learnt has a key `train: false`"
    )
    assert convert({"messages": HI, "loss_mask": [1, 1], "mask": None}, "messages", "f", 1).remarks == ()


ORDERS = {
    "an assistant first": [assistant("hello"), *HI],
    "users in a row": [user("a"), *HI],
    "assistants in a row": [*HI, assistant("there")],
    "a system in the middle": [*HI, system("It is noon."), *HI],
    "calls in a row": [
        user("?"), assistant("", tool_calls=[call("f")]), assistant("", tool_calls=[call("g")]), tool("1"), tool("2"),
        HI[1],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_turns_stand_in_the_order_that_the_row_has_them_in(name):
    assert convert({"messages": ORDERS[name]}, "messages", "f", 1) == Row("f", 1, ORDERS[name], None, None)


@pytest.mark.parametrize("nothing", ["", "  ", None, "absent"])
def test_a_system_turn_that_says_nothing_is_left_out_and_told(nothing):
    row = {"messages": [{"role": "system"} if nothing == "absent" else system(nothing), *HI]}
    repairs = ("left out messages[0].content: an empty system turn",)
    assert convert(row, "messages", "f", 1) == Row("f", 1, HI, None, None, repairs)


@pytest.mark.parametrize("none", [[], None, "[]", ""])
def test_no_call(none):
    row = {"messages": [*HI[:1], assistant("hello", tool_calls=none)]}
    assert convert(row, "messages", "f", 1).messages == HI


def test_turns_under_either_pair_of_keys_in_either_column():
    assert convert({"conversations": HI}, "sharegpt", "f", 1).messages == HI
    assert detect([{"conversations": HI}]) == ("sharegpt", "column `conversations` with role/content")
    assert (
        convert({"messages": said(("human", "hi"), ("gpt", "hello"))["conversations"]}, "messages", "f", 1).messages
        == HI
    )


@pytest.mark.parametrize("empty", [None, "", [], "[]", [None], {"bytes": None, "path": None}, float("nan")])
def test_a_column_of_images_that_holds_none_does_no_harm(empty):
    assert isinstance(convert({"messages": HI, "images": empty, "audio": empty}, "messages", "f", 1), Row)


MAPPED = {
    "roles": ({"conversations": [{"from": "customer", "value": "hi"}, {"from": "agent", "value": "hello"}]}, {}),
    "roles in JSON": (
        {"messages": '[{"role": "customer", "content": "hi"}, {"role": "agent", "content": "hello"}]'},
        {},
    ),
    "keys": (
        {"dialog": [{"speaker": "user", "utterance": "hi"}, {"speaker": "assistant", "utterance": "hello"}]},
        {"columns": {"messages": "dialog"}},
    ),
    "both": (
        {"conversations": [{"speaker": "customer", "utterance": "hi"}, {"speaker": "agent", "utterance": "hello"}]},
        {},
    ),
    "a list of messages and an answer": (
        {"prompt": [{"speaker": "customer", "utterance": "hi"}], "completion": "hello"},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_roles_and_keys_by_a_mapping(tmp_path, name):
    row, more = MAPPED[name]
    path = write(tmp_path, "d.jsonl", row)
    source = Source(
        path=path, roles={"customer": "user", "agent": "assistant"},
        turn_keys={"role": "speaker", "content": "utterance"}, **more,
    )  # fmt: skip
    assert list(read_rows(source)) == [Row(path, 1, HI, None, None)]


def test_a_mapping_that_is_wanting_is_shown(tmp_path):
    path = write(tmp_path, "d.jsonl", MAPPED["keys"][0])
    with pytest.raises(
        UserError, match=r"`columns: {messages: dialog}, turn_keys: {role: speaker, content: utterance}`"
    ):
        list(read_rows(Source(path=path)))
    with pytest.raises(UserError, match=r"`turn_keys` maps the unknown 'rol'; did you mean 'role'\?"):
        list(read_rows(Source(path=path, turn_keys={"rol": "speaker"})))
    (fault,) = read_rows(Source(path=write(tmp_path, "e.jsonl", MAPPED["roles"][0])))
    assert fault.reason.endswith("`roles: {customer: user, agent: assistant}`")
    (fault,) = read_rows(Source(path=path, columns={"messages": "dialog"}, format="messages"))
    assert "its keys are `speaker`, `utterance`; name its own in the recipe: `turn_keys: {role: <key>}`" in fault.reason


def test_a_column_that_is_not_to_be_read(tmp_path):
    path = write(tmp_path, "d.jsonl", {"messages": HI, "label": "spam", "images": ["a.png"]})
    assert isinstance(next(read_rows(Source(path=path))), Fault)
    source = Source(path=path, columns={"label": None, "images": None})
    assert list(read_rows(source)) == [Row(path, 1, HI, None, None)]


def test_names_from_a_file_are_shown_not_sent_to_the_terminal(tmp_path):
    path = write(tmp_path, "d.jsonl", {"\x1b]52;c;aGk=\x07": "a", "\u2028b": "c"})
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path=path)))
    assert str(caught.value).isprintable()
    for row in (
        {"messages": [{"role": "\x1b[2J", "content": "a"}]},
        {"messages": [{"\x1b[2J": "a"}]},
        {"messages": [*HI], "tools": [{"\x1b[2J": 1}]},
        {"messages": [user("a"), {"role": "assistant", "content": "b", "loss": "\x1b[2J"}]},
    ):
        assert convert(row, "messages", "f", 1).reason.isprintable()
    assert "".join(convert({"messages": [HI[0] | {"\x1b[2J": "a"}, HI[1]]}, "messages", "f", 1).remarks).isprintable()
