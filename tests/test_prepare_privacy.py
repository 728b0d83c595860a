"""`align.prepare` from raw rows to a set without private values, test items or the wrong proportions."""

from __future__ import annotations

import json

import pytest
import yaml
from data.preparing.private_values import labelled
from world import align, lines, write_rows

from align import prepare

RAW = [  # values that may stand in no file and on no screen
    "ann.lee@example.org", "4111 1111 1111 1111", "4111111111111111", "GB82WEST12345698765432", "203.0.113.7",
    "536-90-4399", "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "202-555-0143", "2025550143", "hunter2",
]  # fmt: skip
WORDS = ("harbour", "boat", "gull", "water", "north", "net", "wind", "rope", "calm", "night", "weather", "people")


def said(i: int, n: int) -> str:
    return " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] + str((i * k) % 89) for k in range(n))


def talk(question: str, answer: str, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def prepared(here, sources, **sections):
    """Run it on these rows, by file name; what it said, and its folder."""
    for name, rows in sources.items():
        write_rows(here / name, rows)
    recipe = {
        "stage": "prepare", "run": str(here / "set"), "sources": [{"path": str(here / name)} for name in sources],
        "output": {"format": "jsonl"}, "workers": 1, **sections,
    }  # fmt: skip
    (here / "data.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    told = align(here / "data.yaml", stage=prepare)
    return told, here / "set"


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """Private values in every part of rows, in rows that are dropped, and in records that are none."""
    here = tmp_path_factory.mktemp("private")
    mail, card, spaced, iban, ip, ssn, key, phone, bare, word = (RAW[i] for i in (0, 2, 1, 3, 4, 5, 6, 7, 8, 9))
    call = {"name": "pay", "arguments": json.dumps({"card": int(card), "phone": bare, "cc": {mail: iban}})}
    tools = [{"type": "function", "function": {"name": "pay", "description": f"asks {mail} at {ip}"}}]
    rows = [
        talk(f"I am {mail}, my card is {spaced}. {said(1, 9)}", f"Noted: {mail.upper()}. {said(2, 9)}", id=mail),
        {
            "messages": [
                {"role": "user", "content": f"pay {said(3, 9)}"},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": json.dumps({"ssn": ssn, "from": ip})},
                {"role": "assistant", "content": f"done with {key}", "reasoning_content": f"ring {phone}"},
            ],
            "tools": tools,
        },
        talk(f"password: {word} and {{{{name}}}} with {mail}", "dropped by a filter"),
        talk(f"Our phone is {phone} {said(5, 12)}", f"yes {said(6, 12)}"),
        talk(f"Our phone is {phone} {said(5, 12)}", f"yes {said(6, 12)}"),
        {"messages": [{"role": "user", "content": "no answer"}, {"role": mail, "content": f"card {spaced}"}]},
        {"messages": f"not a list but {mail} and {spaced}, {ip}, {phone}"},
    ]
    pairs = [{"prompt": f"who is {mail}? {said(i, 9)}", "chosen": f"{mail} {said(i, 5)}", "rejected": f"{ip} or {mail}"}
             for i in range(3)]  # fmt: skip
    told, folder = prepared(
        here, {"talks.jsonl": rows, "pairs.jsonl": pairs}, invalid="drop",
        prepare={"filter": {"placeholders": True, "words": [{"words": ["zzz"]}]}, "privacy": {}, "deduplicate": {}},
        output={"format": "jsonl", "keep": ["id"]},
    )  # fmt: skip
    assert told.status == 0, told.err
    return told, folder


def test_no_private_value_is_left_in_any_file_or_on_the_screen(private):
    told, folder = private
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"card.json", "report.html", "ledger.jsonl", "manifest.json"} <= {path.name for path in files}
    shown = {path.name: path.read_text("utf-8") for path in files} | {"screen": told.out + told.err}
    for name, text in shown.items():
        for value in RAW:
            assert value.lower() not in text.lower(), (name, value)


def test_placeholders_stand_in_every_part_and_are_counted(private):
    _, folder = private
    rows = lines(folder / "train" / "messages-00000.jsonl")
    assert rows[0]["messages"][0]["content"].startswith("I am <EMAIL_1>, my card is <CARD_1>.")
    assert rows[0]["messages"][1]["content"].startswith("Noted: <EMAIL_1>.")
    assert rows[0]["id"] == "<EMAIL_1>"
    assert "<EMAIL_1>" in json.dumps(rows[1]["tools"])
    assert rows[1]["messages"][3]["reasoning_content"] == "ring <PHONE_1>"
    (pair, *_) = lines(folder / "train" / "pairs-00000.jsonl")
    assert pair["rejected"][0]["content"] == "<IP_1> or <EMAIL_1>"
    (step,) = [
        step for step in json.loads((folder / "manifest.json").read_text())["steps"] if step["name"] == "privacy"
    ]
    assert step["found"]["EMAIL"] >= 8
    cards = json.loads((folder / "card.json").read_text())
    assert (cards["read"]["rows"], cards["read"]["invalid"], cards["written"]["rows"]) == (8, 2, 6)
    assert cards["read"]["duplicates"]["exact"]["rows"] == 1


@pytest.mark.slow
def test_the_whole_labelled_file_goes_through(here):
    texts = [each.text for each in labelled()]
    told, folder = prepared(here, {"texts.jsonl": [{"text": text} for text in texts]}, prepare={"privacy": {}})
    assert told.status == 0, told.err
    written = "".join(path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()) + told.out
    secret = {each.text[a:b] for each in labelled() for kind, a, b in each.values if kind != "KEY" and b - a > 8}
    left = [value for value in secret if value in written]
    assert len(left) <= 0.02 * len(secret), left


def test_a_set_without_the_items_of_a_test_set_in_the_proportions_that_are_wanted(here, world):
    asked = [" ".join(f"asked{(i * 31 + k * k) % 997}" for k in range(30)) for i in range(20)]
    write_rows(here / "test.jsonl", [{"question": text, "answer": "1"} for text in asked])
    long = [{"text": said(100 + i, 40)} for i in range(40)] + [{"text": f"it says: {text} indeed"} for text in asked]
    short = [{"text": said(200 + i, 10)} for i in range(300)]
    told, folder = prepared(
        here, {"long.jsonl": long, "short.jsonl": short}, tokenizer=str(world.base),
        prepare={"decontaminate": {"against": [{"path": str(here / "test.jsonl")}]}}, mix={"weights": [1, 1]},
    )  # fmt: skip
    assert told.status == 0, told.err
    steps = {step["name"]: step for step in json.loads((folder / "manifest.json").read_text())["steps"]}
    assert steps["decontaminate"]["dropped"] == {"holds an item of a test set": 20}
    sources = steps["mix"]["found"]["sources"]
    assert [source["wanted"] for source in sources] == [0.5, 0.5]
    assert sources[0]["share_of_tokens"] == pytest.approx(0.5, abs=0.01)
    rows = lines(folder / "train" / "text-00000.jsonl")
    assert len(rows) == sum(source["rows"] for source in sources)
    assert not any(text in row["text"] for row in rows for text in asked)
    assert json.loads((folder / "card.json").read_text())["read"]["unit"] == "tokens"


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"mix": {"weights": [1, 2]}, "tokenizer": "nowhere"}, "tokenizer: "),
        ({"mix": {"weights": [1, 2], "by": "rows"}}, "mix.weights: expected one for each of the 1 sources, found 2"),
        ({"mix": {}}, "mix.by: tokens are counted by a tokenizer"),
        ({"mix": {"weights": [0.0], "by": "rows"}}, "one weight must be above 0"),
        ({"prepare": {"privacy": {"countries": ["Germany"]}}}, "expected codes such as US or DE"),
        ({"prepare": {"privacy": {"kinds": ["MAIL"]}}}, "MAIL"),
        ({"prepare": {"privacy": {"names": "nowhere"}}}, "prepare.privacy.names: "),
        ({"prepare": {"decontaminate": {"against": []}}}, "against"),
        ({"prepare": {"decontaminate": {"against": [{"path": "nowhere.jsonl"}]}}}, "nowhere.jsonl"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_written(here, sections, problem):
    told, folder = prepared(here, {"rows.jsonl": [{"text": "some words"}]}, **sections)
    assert (told.status, told.out) == (2, "")
    assert problem in told.err
    assert "Traceback" not in told.err
    assert not (folder / "manifest.json").exists()


def test_a_row_nested_too_deeply_is_a_fault_and_no_crash(here):
    deep: dict = {"mail": RAW[0]}
    for _ in range(300):
        deep = {"in": deep}
    call = {"type": "function", "function": {"name": "f", "arguments": deep}}
    row = {"messages": [{"role": "user", "content": "do"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    told, folder = prepared(here, {"rows.jsonl": [row, talk("a b", "c d")]}, invalid="drop", prepare={"privacy": {}})
    assert told.status == 0, told.err
    (entry,) = lines(folder / "ledger.jsonl")
    assert (entry["line"], entry["action"]) == (1, "dropped")
    assert "nested at most 100 deep" in entry["reason"]
