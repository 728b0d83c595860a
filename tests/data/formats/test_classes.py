"""Texts with labels: what is read of every shape of file, what is refused, and how the sides are split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from data.mutants import mutated
from data.voices import SMOLLM, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from align.data.formats.classes import class_numbers, classes, counts, find_labels, formats, prepare_classes
from align.data.formats.formats import Fault, Row, convert, read_rows
from align.data.formats.labels import alike
from align.recipe.errors import UserError
from align.recipe.schema import Data, Eval, Source

RECIPES = Path(__file__).parents[3] / "recipes"
LABELS = ["ham", "spam"]
FORMATS = formats(LABELS)
ANY = formats(None)
PLACED = {"label": "column1", "text": "column2"}
TOKENIZER = tiny_tokenizer(SMOLLM)


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
    return path


def source(path: Path, **options) -> Source:
    return Source(path=str(path), columns=PLACED, **options)


def read(path: Path, **columns: str) -> list[tuple[int, str, str]]:
    rows = read_rows(Source(path=str(path), columns=columns), FORMATS)
    return [(row.line, row.label, row.text) if isinstance(row, Row) else (row.line, row.reason) for row in rows]


def many(spam: int, ham: int) -> list[tuple[str, str]]:
    return [("spam", f"win {i}") for i in range(spam)] + [("ham", f"hello {i}") for i in range(ham)]


def prepared(folder: Path, rows: list[tuple[str, str]], test: Eval | None = None, undersample: bool = False, **data):
    section = Data(train=[source(write(folder / "rows.tsv", rows))], **data)
    return prepare_classes(section, test or Eval(), undersample, LABELS, TOKENIZER, 0, folder / "cache")


def texts(examples) -> set[str]:
    return {TOKENIZER.decode(examples.tree(i).segments[0]) for i in range(len(examples))}


# -- rows ------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path):
    rows = [{"text": "hi, you", "label": "ham"}, {"text": "赢大奖", "label": "spam"}]
    files = {
        "a.jsonl": "\n".join(json.dumps(row) for row in rows),
        "b.json": json.dumps(rows),
        "c.csv": 'text,label\n"hi, you",ham\n赢大奖,spam\n',
        "d.tsv": "text\tlabel\nhi, you\tham\n赢大奖\tspam\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name in (*files, "e.parquet"):
        assert [row[1:] for row in read(tmp_path / name)] == [("ham", "hi, you"), ("spam", "赢大奖")], name


def test_columns_by_name_and_by_place(tmp_path):
    (tmp_path / "a.csv").write_text("v1,v2\nham,hi\n")
    assert read(tmp_path / "a.csv", text="v2", label="v1") == [(2, "ham", "hi")]
    assert read(write(tmp_path / "b.tsv", [("spam", '"win" now')]), **PLACED) == [(1, "spam", '"win" now')]


@pytest.mark.parametrize(("value", "label"), [(" ham ", "ham"), (1, "1"), (1.0, "1"), (0.5, "0.5"), (True, "true")])
def test_labels_are_texts(value, label):
    row = convert({"text": "hi", "label": value}, "classes", "f", 1, formats(["1", "0.5", "true", "ham"]))
    assert isinstance(row, Row), row
    assert row.label == label


def test_one_label_written_in_several_ways_is_one_class(tmp_path):
    """Over CSV, JSON and Parquet; and what counts as another way of writing is said."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").write_text("text,label\na,1\nb,True\nc,01\nd,Spam\n")
    rows = [{"text": t, "label": v} for t, v in (("e", 1), ("f", 1.0), ("g", True), ("h", "spam"))]
    (data / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["i", "j"], "label": [1.0, None]}), data / "c.parquet")
    whole = Source(path=str(data))
    labels = find_labels([whole])
    assert labels == ["1", "Spam", "spam", "true"]
    section = Data(train=[whole], invalid="drop")
    made = prepare_classes(section, Eval(), False, labels, TOKENIZER, 0, tmp_path / "cache").data
    assert counts(made.train, 4).tolist() == [5, 1, 1, 2]
    said = "\n".join(made.summary)
    assert f"{data}/a.csv: the label '01' counts as '1' (1 row)" in said
    assert f"{data}/a.csv: the label 'True' counts as 'true' (1 row)" in said
    assert "warning: 'Spam' and 'spam' are 2 classes; if they are meant as one, write them alike" in said
    assert "warning: '1' and 'true' are 2 classes" in said
    only = prepare_classes(section, Eval(), False, labels, TOKENIZER, 0, tmp_path / "cache").data
    assert only.summary == made.summary, "also from the cache"


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (["007", "008"], ["007", "008"]),
        (["01", "1", "2"], ["1", "2"]),
        (["TRUE", "False", "True"], ["False", "true"]),
        ([0.5, "0.50", "b"], ["0.5", "b"]),
        ([0.1234567, 0.1234568], ["0.1234567", "0.1234568"]),
        (["nan", "inf", "1"], ["1", "inf", "nan"]),
        (["-0", 0, "1"], ["0", "1"]),
    ],
)
def test_how_a_class_is_named(tmp_path, found, labels):
    rows = [{"text": f"{i}", "label": label} for i, label in enumerate(found * 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_labels([Source(path=str(tmp_path / "a.jsonl"))]) == labels


def test_labels_of_the_recipe_that_are_one():
    with pytest.raises(UserError, match=r"classify.labels: '1' and '01' are two ways to write one label"):
        classes(["1", "01"])


def test_labels_that_only_look_alike():
    assert alike(["c", "c++", "C#", "-1", "1", "0", "a"]) == []
    assert len(alike(["not spam", "Not_Spam", "yes", "true", "1"])) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "hi", "label": "ham", "image": "x.png"}, "image: only text can be learnt"),
        ({"text": "hi", "label": "spma"}, "label: expected one of ham, spam, found 'spma'; did you mean 'spam'?"),
        ({"text": "hi", "label": ""}, "label: expected a label, found an empty text"),
        ({"text": "hi"}, "label: expected a label, found nothing"),
        ({"text": "hi", "label": float("nan")}, "label: expected a label, found the number nan"),
        ({"text": "hi", "label": ["ham"]}, "label: expected a label, found the list ['ham']"),
        ({"text": " ", "label": "ham"}, "text: expected text, found only white space"),
        ({"label": "ham"}, "text: expected text, found nothing"),
        ({"text": "\ud800", "label": "ham"}, "text: cannot be written as JSON in UTF-8"),
        ("hi", "expected a row of named columns, found the text 'hi'"),
    ],
)
def test_refused_rows_say_why(row, reason):
    fault = convert(row, "classes", "f", 7, FORMATS)
    assert isinstance(fault, Fault)
    assert fault[:2] == ("f", 7)
    assert fault.reason.startswith(reason)


GOOD = {"text": ("classes", {"text": "hi", "label": "ham"}), "number": ("classes", {"text": "win", "label": 1})}


@given(mutated(GOOD, ["classes"]), st.booleans())
def test_no_row_breaks_the_reader(mutant, known):
    format, row = mutant
    read = convert(row, format, "f", 1, FORMATS if known else ANY)
    assert isinstance(read, Row | Fault)
    if isinstance(read, Row):
        json.dumps([read.text, read.label], ensure_ascii=False).encode()
        assert read.text.strip()
        assert read.label == read.label.strip() != ""
        assert not known or read.label in LABELS


# -- labels ----------------------------------------------------------------------------------------------------


def test_labels_found_in_the_data_are_sorted_numbers_as_numbers(tmp_path):
    rows = [(label, "x") for label in ("10", "9", "b", "a")] * 3
    assert find_labels([source(write(tmp_path / "a.tsv", rows))]) == ["9", "10", "a", "b"]


def test_a_single_label_and_a_column_of_something_else_are_told(tmp_path):
    with pytest.raises(UserError, match="every row has the label 'ham'; a classifier needs two"):
        find_labels([source(write(tmp_path / "a.tsv", [("ham", "x")] * 3))])
    swapped = write(tmp_path / "b.tsv", [(f"text {i}", "ham") for i in range(9)])
    with pytest.raises(UserError, match="9 different labels in 9 rows; which column holds the labels"):
        find_labels([source(swapped)])


# -- sides -----------------------------------------------------------------------------------------------------


def test_three_sides_share_no_text_and_lose_no_row(tmp_path):
    rows = many(30, 60) + many(10, 20)  # the last 30 are duplicates
    sides = prepared(tmp_path, rows, Eval(fraction=0.2), eval={"fraction": 0.1})
    parts = (sides.data.train, sides.data.eval, sides.test)
    assert [len(part) for part in parts] == pytest.approx([84, 12, 24], abs=2)
    assert sum(len(part) for part in parts) == 120
    for i, part in enumerate(parts):
        assert texts(part).isdisjoint(set().union(*(texts(other) for other in parts[:i])))
    assert any("30 exact duplicates" in line for line in sides.data.summary)
    assert sides.data.summary[-1].startswith(f"test: {len(sides.test)} rows")


def test_what_becomes_of_rows_of_the_test_is_told(tmp_path):
    tested = [*many(3, 3), ("other", "what")]
    test = Eval(sources=[source(write(tmp_path / "test.tsv", tested))], max_rows=4)
    sides = prepared(tmp_path, many(30, 60), test, invalid="drop")
    assert [len(sides.data.train), len(sides.test)] == [86, 4]
    assert "test: 7 rows read, 1 dropped (1 invalid), 0 truncated, 0 repaired, 0 exact duplicates" in sides.data.summary
    assert "4 rows left out: the text is in the test set" in sides.data.summary
    reasons = sorted(entry["reason"] for entry in sides.data.ledger.entries)
    assert reasons[:2] == ["held out, beyond classify.test.max_rows = 4"] * 2
    assert len(reasons) == 7


def test_each_share_is_of_all_rows(tmp_path):
    sides = prepared(tmp_path, many(50, 50), Eval(fraction=0.25), eval={"fraction": 0.5})
    assert [len(part) for part in (sides.data.train, sides.data.eval, sides.test)] == [25, 50, 25]


def test_a_class_number_is_the_place_among_the_labels(tmp_path):
    train = prepared(tmp_path, [("spam", "win"), ("ham", "hello"), ("spam", "prize")]).data.train
    assert class_numbers(train).tolist() == [1, 0, 1]
    assert [train.tree(i).targets for i in range(3)] == [(1.0,), (0.0,), (1.0,)]
    assert texts(train) == {"win", "hello", "prize"}
    assert not any(train.tree(i).trained[0].any() for i in range(3))


def test_undersampling_leaves_as_many_of_each_and_tells_the_rest(tmp_path):
    sides = prepared(tmp_path, many(7, 40), undersample=True)
    assert counts(sides.data.train, 2).tolist() == [7, 7]
    dropped = [entry for entry in sides.data.ledger.entries if "beyond 7 rows of its class" in entry["reason"]]
    assert len(dropped) == 33
    again = prepared(tmp_path, many(7, 40), undersample=True)
    assert texts(again.data.train) == texts(sides.data.train)


def test_another_seed_keeps_other_rows(tmp_path):
    path = write(tmp_path / "rows.tsv", many(7, 40))
    kept = []
    for seed in (0, 1):
        sides = prepare_classes(Data(train=[source(path)]), Eval(), True, LABELS, TOKENIZER, seed, tmp_path / "cache")
        kept.append(texts(sides.data.train))
    assert kept[0] != kept[1]


def test_rows_of_test_sources_are_not_trained_on(tmp_path):
    held = write(tmp_path / "held.tsv", [("ham", "hello 3"), ("spam", "win 4"), ("spam", "new")])
    sides = prepared(tmp_path, many(10, 10), Eval(sources=[source(held)]), eval={"fraction": 0.1})
    assert texts(sides.test) == {"hello 3", "win 4", "new"}
    assert len(sides.data.train) + len(sides.data.eval) == 18
    reasons = [entry["reason"] for entry in sides.data.ledger.entries]
    assert reasons == ["its text is in the test set"] * 2


def test_long_texts_are_cut_and_stay(tmp_path):
    rows = [("spam", "win " * 50), ("ham", "hi")]
    train = prepared(tmp_path, rows, max_length=5, overlong="truncate").data.train
    assert sorted(len(train.tree(i).segments[0]) for i in range(2)) == [2, 5]


def test_a_class_without_rows_is_an_error_that_counts_the_others(tmp_path):
    with pytest.raises(UserError, match=r"no row to train on has the label 'spam', of 3 rows, .*: 3 ham, 0 spam"):
        prepared(tmp_path, [("ham", f"hi {i}") for i in range(3)], undersample=True)


def test_a_class_that_the_split_took_whole_is_an_error_too(tmp_path):
    with pytest.raises(UserError, match="no row to train on has the label"):
        prepared(tmp_path, [("ham", "a"), ("spam", "b"), ("ham", "a"), ("spam", "b")], eval={"fraction": 0.5})


def test_faulty_rows_are_errors_with_their_lines_or_dropped(tmp_path):
    rows = [("spam", "win"), ("spma", "oops"), ("ham", ""), ("ham", "hi")]
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, rows)
    told = str(caught.value).replace(str(tmp_path), "")
    assert "/rows.tsv:2: label: expected one of ham, spam, found 'spma'" in told
    assert "/rows.tsv:3: text: expected text, found an empty text" in told
    assert len(prepared(tmp_path, rows, invalid="drop").data.train) == 2


@pytest.mark.parametrize("name", ["spam", "sentiment"])
def test_the_shipped_recipes_read_their_templates(name):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8"))
    source = dict(recipe["data"]["train"][0])
    source["path"] = str(RECIPES.parent / source["path"])
    labels = recipe["classify"].get("labels") or find_labels([Source(**source)])
    rows = list(read_rows(Source(**source), formats(labels)))
    assert all(isinstance(row, Row) for row in rows)
    taken = Counter(row.label for row in rows)
    assert set(taken) == set(labels)
    assert len(set(taken.values())) == 1  # balanced
    assert len({row.text for row in rows}) == len(rows)
