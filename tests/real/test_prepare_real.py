"""`align.prepare` on published data sets: what is known to be wrong with each is found, counted and shown."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from world import align, lines, write_rows

from align import prepare
from align.data.preparing.decontamination import Index, Measured
from align.data.preparing.privacy import Privacy
from align.data.preparing.texts import normal

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def prepared(here, source, **sections):
    """The card, the steps by name, the page and the ledger of a set of one source."""
    recipe = {
        "stage": "prepare", "run": str(here / "set"), "invalid": "drop", "sources": [source],
        "output": {"format": "jsonl"}, "workers": 1, **sections,
    }  # fmt: skip
    (here / "data.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    told = align(here / "data.yaml", stage=prepare)
    assert told.status == 0, told.err
    folder = here / "set"
    steps = {step["name"]: step for step in json.loads((folder / "manifest.json").read_text("utf-8"))["steps"]}
    card = json.loads((folder / "card.json").read_text("utf-8"))
    return card, steps, (folder / "report.html").read_text("utf-8"), lines(folder / "ledger.jsonl")


@pytest.mark.slow
def test_sms_has_403_duplicate_lines(here):
    columns = {"label": "column1", "text": "column2"}
    source = {"path": str(DATA / "sms_spam/SMSSpamCollection"), "format": "classes", "columns": columns}
    card, steps, page, ledger = prepared(here, source, prepare={"deduplicate": {"exact": "same"}})
    assert (card["read"]["rows"], card["written"]["rows"]) == (5574, 5574 - 403)
    assert card["read"]["labels"] == {"ham": 4827, "spam": 747}
    assert card["read"]["duplicates"]["exact"]["rows"] == 403
    assert steps["deduplicate.exact"]["dropped"] == {"the same as an earlier row": 403}
    assert sum("the same as an earlier row" in entry["reason"] for entry in ledger) == 403
    assert "403" in page


@pytest.mark.slow
def test_sharegpt_zh_has_seven_that_end_on_the_human_and_one_empty_value(here):
    card, _, page, ledger = prepared(here, {"path": str(DATA / "sharegpt_zh/sharegpt_zh_1K_format.jsonl")})
    cut = [entry for entry in ledger if "after the last assistant turn" in entry["reason"]]
    alone = [entry for entry in ledger if "expected an assistant turn to learn from" in entry["reason"]]
    assert len(cut) + len(alone) == 7, "one of them has no other turn"
    assert sum(count for words, count in card["read"]["repairs"].items() if "last assistant turn" in words) == len(cut)
    assert [entry["line"] for entry in ledger if "found an empty text" in entry["reason"]] == [59]
    assert card["read"]["faults"] == {
        "conversations: expected an assistant turn to learn from, found none": 1,
        "conversations[N].value: expected text, found an empty text": 1,
    }
    assert card["read"]["languages"]["zh"] > 800
    assert "after the last assistant turn" in page


@pytest.mark.parametrize(
    ("file", "rows", "equal", "empty"),
    [
        pytest.param("ultrafeedback/train_clean.jsonl", 1000, 4, 2, marks=pytest.mark.slow),
        ("instruction/instruction-data-with-preference.json", 1100, 6, 0),
    ],
)
def test_pairs_whose_answers_are_equal(here, file, rows, equal, empty):
    card, _, page, ledger = prepared(here, {"path": str(DATA / file)})
    assert (card["read"]["rows"], card["read"]["invalid"]) == (rows - equal - empty, equal + empty)
    assert sum("expected another answer than" in entry["reason"] for entry in ledger) == equal
    assert "expected another answer than" in page


def test_the_demo_sets_have_duplicates_and_placeholders(here):
    source = {"path": str(DATA / "llamafactory/identity.json")}
    card, steps, page, _ = prepared(here, source, prepare={"filter": {"placeholders": True}})
    rows = json.loads((DATA / "llamafactory/identity.json").read_text("utf-8"))
    held = sum("{{" in json.dumps(row) for row in rows)
    assert held > 0
    assert sum(steps["filter.placeholders"]["dropped"].values()) == held
    assert card["written"]["rows"] == len(rows) - held
    assert "placeholder" in page


@pytest.mark.parametrize(
    ("file", "equal"),
    [
        ("alpaca_en_demo.json", 14), ("alpaca_zh_demo.json", 8), ("dpo_en_demo.json", 5), ("dpo_zh_demo.json", 11),
        ("glaive_toolcall_en_demo.json", 35), ("glaive_toolcall_zh_demo.json", 43), ("v1_sft_demo.jsonl", 1),
        ("kto_en_demo.json", 0), ("identity.json", 0),
    ],
)  # fmt: skip
def test_rows_of_the_demo_sets_that_stand_there_twice(here, file, equal):
    """Counted here as texts; found, shown, and named with the row that each repeats."""
    path = DATA / "llamafactory" / file
    rows = lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text("utf-8"))
    said = [json.dumps(row, sort_keys=True) for row in rows]
    assert len(said) - len(set(said)) == equal
    card, steps, page, ledger = prepared(here, {"path": str(path)}, prepare={"deduplicate": {"exact": "same"}})
    assert card["read"]["duplicates"]["exact"]["rows"] == equal
    assert steps["deduplicate.exact"]["found"]["repeated"] == equal
    assert card["written"]["rows"] == card["read"]["rows"] - equal
    again = [entry for entry in ledger if entry["reason"].startswith("deduplicate.exact")]
    for entry in again:
        first = int(entry["reason"].rpartition(":")[2])
        assert first < entry["line"]
        assert path.suffix == ".json" or said[entry["line"] - 1] == said[first - 1]
    assert len(again) == equal
    assert ("the same as an earlier row" in page) == bool(equal)


@pytest.fixture(scope="module")
def questions():
    return [row["question"] for row in lines(DATA / "gsm8k/train.jsonl")]


def reworded(text: str, rng: random.Random) -> str:
    """Lightly: two numbers, a name and two or three other words are changed."""
    words = text.split()
    numbers = [i for i, word in enumerate(words) if re.fullmatch(r"\$?\d+[.,?]?", word)]
    for i in rng.sample(numbers, min(2, len(numbers))):
        words[i] = re.sub(r"\d+", lambda found: str(int(found[0]) + 3), words[i])
    words[0] = "Yesterday, " + words[0]
    for i in rng.sample(range(1, len(words)), 3):
        words[i] = rng.choice(("some", "about", "really", "maybe", "small"))
    return " ".join(words)


@pytest.mark.slow
def test_planted_test_questions_are_found_and_little_else(here, questions):
    """50 of the last questions stand for a test set; they are planted in the others, half of them reworded."""
    rng = random.Random(3)
    held = rng.sample(questions[-1000:], 50)
    others = [text for text in questions[:1500] if text not in held]
    plants = held[:25] + [reworded(text, rng) for text in held[25:]]
    rows = [{"prompt": text, "completion": "It is 3."} for text in [*others, *plants]]
    write_rows(here / "train.jsonl", rows)
    write_rows(here / "test.jsonl", [{"question": text, "answer": "#### 3"} for text in held])
    against = {"against": [{"path": str(here / "test.jsonl")}]}
    _, _, page, ledger = prepared(here, {"path": str(here / "train.jsonl")}, prepare={"decontaminate": against})
    found = {entry["line"] for entry in ledger if "decontaminate" in entry["reason"]}
    first = len(others) + 1
    assert found >= set(range(first, first + 25)), "all exact ones"
    assert len(found & set(range(first + 25, first + 50))) >= 20, "most of the reworded"
    assert len([line for line in found if line < first]) <= 2
    assert "test.jsonl" in page


@pytest.mark.slow
def test_other_data_is_not_contaminated_with_school_maths(questions):
    """Nothing of other published sets is taken for one of 7,473 questions."""
    index = Index((Measured(f"q:{i}", normal(text)) for i, text in enumerate(questions)), 6)
    texts = [row["text"] for row in lines(DATA / "llamafactory/c4_demo.jsonl")]
    rows = json.loads((DATA / "llamafactory/alpaca_en_demo.json").read_text("utf-8"))
    texts += [f"{row['instruction']} {row['output']}" for row in rows]
    shares = [index.best(normal(text)) for text in texts]
    assert max((match.share for match in shares if match), default=0) < 0.5


@pytest.mark.slow
def test_school_maths_has_no_private_values(questions):
    found = Privacy().find([("", text) for text in questions[:2000]])
    assert [each for finds in found for each in finds] == []
