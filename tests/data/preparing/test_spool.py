"""The spool, the split, and rows as they are written."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from data.preparing.items import labelled_text, pair, talk, text
from data.preparing.test_duplicates import Sketched, decided

from align.data.formats.formats import read_rows
from align.data.formats.rows import Row
from align.data.preparing.reading import ALL, kind_of
from align.data.preparing.split import Split
from align.data.preparing.spool import JOURNAL, Spool
from align.data.preparing.step import Item
from align.data.preparing.work import packed, unpacked
from align.data.preparing.written import KINDS, as_jsonl, as_parquet, as_row, shapes
from align.recipe.schema import Source

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"q": "x", "n": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"q": {"type": "string"}}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好 \U0001f600"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "name": "find", "tool_call_id": "c1"},
    {"role": "assistant", "content": "no", "train": False},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "42", "reasoning_content": "because"},
]


def rich(number: int = 0) -> Item:
    row = Row("rows.jsonl", number + 1, MESSAGES, None, [TOOL])
    return Item(number, 0, "messages", row, {"id": number})


def rows_of(kind: str) -> list[Item]:
    ranked = Row("r", 1, [{"role": "user", "content": "q"}], None, None, (), tuple(
        {"role": "assistant", "content": said} for said in "abc"
    ))  # fmt: skip
    judged = ranked._replace(answers=ranked.answers[:1], targets=(0.0,))
    asked = ranked._replace(answers=())
    return {
        "text": [text("a\n\nb"), text("c", 1)],
        "classes": [labelled_text("a", "spam"), labelled_text("b", "1", 1)],
        "messages": [rich(), talk("a", "b", number=1)],
        "pairs": [pair("q", "a", "b"), pair("q", "c", "d", 1, margin=0.5)],
        "ranked": [Item(0, 0, "ranked", ranked, {})],
        "labelled": [Item(0, 0, "labelled", judged, {}), Item(1, 0, "labelled", judged._replace(targets=(1.0,)), {})],
        "prompts": [Item(0, 0, "prompts", asked, {})],
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_written_rows_read_back_as_they_were(kind, form, tmp_path):
    items = rows_of(kind)
    assert all(kind_of(item.row) == item.kind == kind for item in items)
    written = [as_row(item, ()) for item in items]
    extra = int(np.bitwise_or.reduce(shapes(items, ())["extra"]))
    data = as_jsonl(written) if form == "jsonl" else as_parquet(written, kind, extra, {})
    file = tmp_path / f"rows.{form}"
    file.write_bytes(data)
    back = list(read_rows(Source(path=str(file)), ALL))
    bare = {"file": "", "line": 0, "repairs": (), "remarks": ()}
    assert [row._replace(**bare) for row in back] == [item.row._replace(**bare) for item in items]
    assert data == (as_jsonl(written) if form == "jsonl" else as_parquet(written, kind, extra, {}))


def test_a_schema_has_only_what_some_row_has_and_kept_columns_their_type():
    items = [talk("a", "b", n=1, mixed="x", deep={"a": 1}), talk("c", "d", number=1, n=2.5, mixed=3)]
    kept = ("n", "mixed", "deep")
    bits = {
        name.removeprefix("kept:"): int(np.bitwise_or.reduce(column)) for name, column in shapes(items, kept).items()
    }
    data = as_parquet(
        [as_row(one, kept) for one in items], "messages", bits["extra"], {name: bits[name] for name in kept}
    )
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    assert str(table.schema.field("messages").type) == "list<element: struct<role: string, content: string>>"
    assert table.column("n").to_pylist() == [1.0, 2.5]
    assert table.column("mixed").to_pylist() == ['"x"', "3"]
    assert table.column("deep").to_pylist() == ['{"a": 1}', None]


def test_items_survive_the_disk():
    odd = rich()._replace(record={"id": 1, "list": [1.5, None, "\udc80"[:0]]})
    odd = odd._replace(row=odd.row._replace(file="na\udce9me.jsonl", repairs=("a",), targets=(1.0, 0.0)))
    assert unpacked(packed(odd)) == odd


def test_a_spool_goes_on_wherever_it_was_cut_off(tmp_path):
    def add(spool: Spool, number: int) -> None:
        rows = [f"row {number}.{i}\n".encode() for i in range(number)]
        columns = {
            "number": np.arange(number, dtype=np.int64),
            "s:part": np.arange(2 * number, dtype=np.uint64),
            "s:part/counts": np.full(number, 2, np.int64),
        }
        spool.add_rows({"n": number}, rows, columns, ledger=f"{number}\n".encode())

    whole = Spool(tmp_path / "whole")
    for number in range(4):
        add(whole, number)
    whole.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    journal = files[JOURNAL]
    for cut in (*range(0, len(journal), 37), len(journal) - 1):
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / JOURNAL).write_bytes(journal[:cut])
        spool = Spool(folder)
        assert len(spool.batches) == journal[:cut].count(b"\n")
        for number in range(len(spool.batches), 4):
            add(spool, number)
        assert list(spool.rows(np.array([0, 2, 5]))) == [b"row 1.0\n", b"row 2.1\n", b"row 3.2\n"]
        spool.close()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_sides_hold_whole_groups_and_their_shares():
    items = [talk(f"question {i // 2}", f"answer {i}", number=i) for i in range(400)]
    split = Split({"eval": 0.1, "test": 0.2}, seed=7)
    found = decided(split, items)
    assert found.sides == ("train", "eval", "test")
    assert np.bincount(found.side).tolist() == [280, 40, 80]
    assert (found.side[::2] == found.side[1::2]).all(), "two answers to a question"
    more = decided(split, [*items, *(talk(f"new {i}", "a", number=400 + i) for i in range(20))])
    assert (more.side[:400] != found.side).sum() <= 30, "more data moves few rows"
    alive = np.arange(400) % 4 != 0
    assert np.bincount(decided(split, items, alive).side[alive]).tolist() == [210, 30, 60]
    group = np.arange(400)
    group[399] = 0  # the last is a duplicate of the first
    side = split.decide(Sketched(split, items), np.ones(400, bool), group).side
    assert side[399] == side[0] == side[1] == side[398]
