"""Reading files: line numbers, laziness, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import io
import json
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.files import read_file
from align.data.formats import Fault, Row, read_rows
from align.data.lines import CHUNK, Broken, json_array
from align.data.paths import data_files, is_hub_id
from align.recipe.errors import UserError
from align.recipe.schema import Source


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(folder: Path, name: str, content: str | bytes) -> list:
    return list(read_file(put(folder, name, content)))


def refusal(folder: Path, name: str, content: str | bytes) -> str:
    """The problem with a file, its folder's name taken off."""
    path = put(folder, name, content)
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path=str(path))))
    return str(caught.value).replace(f"{folder}/", "")


ROWS = [(1, {"text": "a"}), (3, {"text": "é\n雪"})]


def test_json_lines_keep_their_numbers_over_empty_lines(tmp_path):
    assert records(tmp_path, "a.jsonl", '\ufeff{"text": "a"}\n\n{"text": "é\\n雪"}\n') == ROWS


def test_json_array_keeps_line_numbers(tmp_path):
    assert records(tmp_path, "a.json", '\ufeff[{"text": "a"},\n\n{"text":\n"é\\n雪"}\n]\n') == ROWS
    assert records(tmp_path, "b.jsonl", '[{"text": "a"},\r\n\r\n  {"text": "é\\n雪"}]') == ROWS


def test_json_lines_under_the_name_json(tmp_path):
    assert records(tmp_path, "a.json", '{"text": "a"}\n\n{"text": "é\\n雪"}') == ROWS


def test_csv_numbers_the_line_where_a_row_starts(tmp_path):
    content = 'prompt,completion\n"a\nb",c\r\n\r\n"say ""hi""",雪\n'
    expected = [(2, {"prompt": "a\nb", "completion": "c"}), (5, {"prompt": 'say "hi"', "completion": "雪"})]
    assert records(tmp_path, "a.csv", content) == expected
    assert records(tmp_path, "a.tsv", content.replace(",", "\t")) == expected


def test_csv_cell_longer_than_the_csv_modules_default(tmp_path):
    assert records(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n") == [(2, {"text": "x" * 200_000})]


def test_csv_row_of_another_width_is_broken_alone(tmp_path):
    rows = records(tmp_path, "a.csv", "prompt,completion\na\nb,c\n")
    assert rows == [
        (2, Broken("expected 2 cells as in the header, found 1")),
        (3, {"prompt": "b", "completion": "c"}),
    ]


def test_text_documents_are_parted_by_blank_lines(tmp_path):
    assert records(tmp_path, "a.txt", "\nOne\n two \n\n \nThree\n") == [
        (2, {"text": "One\n two"}),
        (6, {"text": "Three"}),
    ]


def test_text_without_blank_lines_has_a_document_a_line(tmp_path):
    assert records(tmp_path, "a.txt", "\nOne\ntwo\n\n") == [(2, {"text": "One"}), (3, {"text": "two"})]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "a"}'), ("a.json", '[{"text": "a"}]'), ("a.csv", "text\na\n")]
)
def test_gzip(tmp_path, name, content):
    plain = records(tmp_path, name, content)
    assert plain
    assert records(tmp_path, name + ".gz", gzip.compress(content.encode())) == plain


def test_parquet_rows_are_numbered_and_read_as_messages(tmp_path):
    turns = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": "hello", "tool_calls": None},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}] * 300), path)
    rows = list(read_rows(Source(path=str(path))))
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert rows == [Row(str(path), n, plain, None, None) for n in range(1, 301)]


def test_folder_takes_data_files_sorted_and_leaves_out_the_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.csv.gz", "sub/c.txt", ".hidden.json", "LICENSE.txt", "README.md", "notes.doc"):
        put(tmp_path, name, "x")
    assert [str(p.relative_to(tmp_path)) for p in data_files(str(tmp_path))] == [
        "a.csv.gz",
        "b.jsonl",
        "sub/c.txt",
    ]


class Endless(io.RawIOBase):
    """A JSON array without end that counts how much of it was read."""

    def __init__(self):
        self.element = json.dumps({"text": "x" * 500}).encode() + b",\n"
        self.given = 0

    def read(self, size=-1):
        assert size > 0, "a read without a limit never ends"
        start, self.given = self.given, self.given + size
        whole = self.element * (size // len(self.element) + 2)
        skip = (start - 1) % len(self.element)
        return (b"[" + whole)[:size] if start == 0 else whole[skip : skip + size]


def test_an_array_is_read_only_as_far_as_it_is_taken():
    stream = Endless()
    rows = list(islice(json_array(stream, "endless"), 1000))
    assert rows == [(n, {"text": "x" * 500}) for n in range(1, 1001)]
    assert stream.given < 1001 * len(stream.element) + 2 * CHUNK


def test_rows_longer_than_a_chunk_and_cut_at_every_place():
    rows = [{"text": "雪\\" * n, "n": [n, -1.5e3, True, None]} for n in (1, CHUNK, 5, 3 * CHUNK)]
    content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    assert [value for _, value in json_array(io.BytesIO(content), "f")] == rows

    class Bytewise(io.BytesIO):
        def read(self, size=-1):
            return super().read(1)

    small = b'\n[ {"a": "\xe9\x9b\xaa\\n", "b": [true, -1.25e3]} ,\n {} ] \n'
    assert list(json_array(Bytewise(small), "f")) == [(2, {"a": "雪\n", "b": [True, -1250.0]}), (3, {})]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "a.jsonl: holds no rows"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.csv", "prompt,completion\n", "a.csv: holds no rows"),
        ("a.txt", "\n \n", "a.txt: holds no rows"),
        ("a.json", '[{"text": "a"},\n {"text": b}]', "a.json:2: broken JSON at column 11: Expecting value"),
        (
            "a.json",
            '[{"text": "a"}\n {"text": "b"}]',
            "a.json:2: broken JSON at column 2: expected ',', found '{'",
        ),
        (
            "a.json",
            '[{"text": "a"}',
            "a.json:1: broken JSON at column 15: expected ',', found the end of the file",
        ),
        ("a.json", '[{"text": "a\nb"}]', "a.json:1: broken JSON at column 13: Invalid control character"),
        (
            "a.json",
            '[{"text": "a"}]\n[]',
            "a.json:2: broken JSON at column 1: found more text after the array's end",
        ),
        (
            "a.json",
            '{\n"text": "a"}',
            "a.json:1: a row spans several lines; expected an array of rows or one row a line",
        ),
        ("a.json", '["a"]', "a.json:1: expected a row of named columns, found the text 'a'"),
        ("a.jsonl", "nope\n", "a.jsonl:1: broken JSON at column 1: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 (byte 0xff"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2: not UTF-8 (byte 0xff"),
        ("a.txt", b"a\n\nb\xe9", "a.txt:3: not UTF-8 (byte 0xe9"),
        ("a.csv", 'text\na\n"b', "a.csv:3: broken CSV: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: a column stands twice in the header: text, text"),
        ("a.csv", "question,answer\na,b\n", "a.csv: no format fits its columns `question`, `answer`"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: broken gzip: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            "a.jsonl.gz: broken gzip: Compressed file ended",
        ),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as Parquet"),
        ("a.xlsx", b"", "a.xlsx: unknown extension '.xlsx'; expected one of .json, .jsonl"),
        ("a.parquet.gz", b"", "a.parquet.gz: unknown extension '.gz'"),
        ("data", b"", "data: no extension; expected one of .json"),
    ],
)
def test_a_broken_file_says_where_and_why(tmp_path, name, content, problem):
    assert refusal(tmp_path, name, content).startswith(problem)


def test_a_broken_json_line_is_a_fault_of_that_line_alone(tmp_path):
    path = put(tmp_path, "a.jsonl", '{"text": "a"}\n{"text" "b"}\n[1]\n{"text": "c"}\n')
    first, broken, list_row, last = read_rows(Source(path=str(path)))
    assert (first.text, last.text) == ("a", "c")
    assert broken == Fault(str(path), 2, "broken JSON at column 9: Expecting ':' delimiter")
    assert list_row == Fault(str(path), 3, "expected a row of named columns, found the list [1]")


@pytest.mark.parametrize("depth", [200, 900, 960, 990, 100_000])
def test_a_bottomless_nest_is_a_fault_or_an_error(tmp_path, depth):
    nest = f'{{"prompt": {"[" * depth}{"]" * depth}, "completion": "a"}}'
    good = '{"prompt": "a", "completion": "b"}'
    lines = put(tmp_path, "a.jsonl", f"{good}\n{nest}\n{good}\n")
    kinds = [type(row) for row in read_rows(Source(path=str(lines)))]
    assert kinds == [Row, Fault, Row]
    array = put(tmp_path, "a.json", f"[{good},\n{nest}]")
    try:
        kinds = [type(row) for row in read_rows(Source(path=str(array)))]
    except UserError as error:
        kinds = str(error).split(":")[1]
    assert kinds in ([Row, Fault], "2")


def test_a_missing_file_names_its_neighbour(tmp_path):
    put(tmp_path, "train.jsonl", "x")
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file or folder; did you mean '.*/train\.jsonl'\?"):
        data_files(str(tmp_path / "trian.jsonl"))


def test_a_folder_without_data(tmp_path):
    put(tmp_path, "README.md", "x")
    with pytest.raises(UserError, match=r"the folder has no data file; expected some of \.json"):
        data_files(str(tmp_path))


def test_what_can_only_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id("openai/gsm8k")
    assert is_hub_id("squad")
    for local in ("here", "here/missing", "missing/rows.jsonl", "rows.csv.gz", "./a", "/a/b", "a/b/c", "~/a"):
        assert not is_hub_id(local)


def test_a_hub_id_without_network_is_told_as_such(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path="nobody/no-such-set")))
    assert str(caught.value).startswith("nobody/no-such-set: no such file or folder; and as a hub data set")
    assert "needs network access" in str(caught.value)


GOOD = {
    "a.jsonl": b'{"prompt": "a", "completion": "b"}\n' * 3,
    "a.json": b'[{"text": "\xe9\x9b\xaa"},\n {"text": "b\\n"}]',
    "a.csv": b'prompt,completion\na,"b\nc"\n"d ""e""",f\n',
    "a.tsv": b"text\tn\na\t1\nb\t2\n",
    "a.txt": b"one\n\ntwo\nthree\n",
    "a.jsonl.gz": gzip.compress(b'{"messages": [{"role": "user", "content": "a"}]}\n', mtime=0),
}


@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_fuzz_mutated_files_give_rows_faults_or_user_errors(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(sorted(GOOD)))
    content = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b'"', b"\n", b"\r", b"[", b"]", b"{", b",", b"\t", b"\\", b"\x00"]) | st.binary(max_size=3)
        )
    try:
        rows = list(read_rows(Source(path=str(put(folder, name, bytes(content))))))
    except UserError as error:
        problems = error.problems
    else:
        problems = ()
        assert rows
        assert all(isinstance(row, Row | Fault) for row in rows)
        assert all(1 <= row.line <= content.count(b"\n") + 1 for row in rows) or name.endswith(".gz")
    assert all(name in problem for problem in problems)


PLACED = {"label": "column1", "text": "column2"}


def placed(folder: Path, name: str, content: str | bytes) -> list:
    return list(read_file(put(folder, name, content), PLACED))


def test_columns_named_by_place_need_no_header(tmp_path):
    rows = [(1, {"column1": "ham", "column2": "hi, you"}), (3, {"column1": "spam", "column2": "win"})]
    assert placed(tmp_path, "a.csv", 'ham,"hi, you"\n\nspam,win\n') == rows
    assert placed(tmp_path, "a.tsv", "ham\thi, you\n\nspam\twin\n") == rows


@pytest.mark.parametrize("header", ["label,text", "column1,column2", "label , column2"])
def test_a_header_with_the_formats_names_or_places_is_no_row(tmp_path, header):
    assert placed(tmp_path, "a.csv", f"{header}\nham,hi\n") == [(2, {"column1": "ham", "column2": "hi"})]


def test_quotes_of_a_raw_table_are_letters(tmp_path):
    content = 'ham\t"hi" he said\nspam\t"win\nham\tbye"\n'
    texts = [row["column2"] for _, row in placed(tmp_path, "a.tsv", content)]
    assert texts == ['"hi" he said', '"win', 'bye"']
    assert "where quotes are letters, name columns by place" in refusal(tmp_path, "b.tsv", "label\ttext\n" + content)


def test_a_raw_row_of_another_width_is_broken_alone(tmp_path):
    assert placed(tmp_path, "a.tsv", "ham\thi\nspam\nham\ta\tb\n")[1:] == [
        (2, Broken("expected 2 cells as in the first row, found 1")),
        (3, Broken("expected 2 cells as in the first row, found 3")),
    ]


def test_a_table_may_have_no_extension_if_tabs_part_its_first_line(tmp_path):
    assert data_files(str(put(tmp_path, "Collection", "ham\thi\n"))) == [tmp_path / "Collection"]
    assert placed(tmp_path, "Collection", "ham\thi\r\n") == [(1, {"column1": "ham", "column2": "hi"})]
    assert "no extension" in refusal(tmp_path, "Other", "ham hi\n")
