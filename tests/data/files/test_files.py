"""Reading files: line numbers, laziness, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import io
import json
import os
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.voices import SMOLLM, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from often import often

from align.data.files.arrow import unpadded
from align.data.files.files import read_file
from align.data.files.lines import CHUNK, Broken, json_array
from align.data.files.paths import data_files, is_hub_id, survey
from align.data.files.tables import delimiter_note
from align.data.formats.formats import Fault, Row, read_rows
from align.data.store import stored
from align.data.templates.render import conversations
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
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8 (byte 0xff"),
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


def test_a_key_that_stands_twice_in_an_object_is_a_fault_of_that_row_alone(tmp_path):
    """Which of both values is meant, nobody knows."""
    told, fine = Broken("the key 'a' stands twice in one object"), {"a": [{"a": 1}, {"a": 2}]}
    texts = ('{"a": 1, "a": 1}', json.dumps(fine), '{"b": {"a": 1, "c": 2, "a": 3}}')
    for name, text in ("d.jsonl", "\n".join(texts)), ("d.json", f"[{', '.join(texts)}]"):
        assert [value for _, value in records(tmp_path, name, text)] == [told, fine, told]


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


@settings(max_examples=often(1500), deadline=None)
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


def test_arrow_padding_is_left_out_and_a_written_null_stays(tmp_path):
    """JSON and Parquet give the same rows; a null among other values of a struct cannot be told from padding."""

    def row(name, parameters, arguments):
        tools = [{"type": "function", "function": {"name": name, "parameters": {"properties": parameters}}}]
        call = [{"function": {"name": name, "arguments": arguments}}]
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": call}]
        return {
            "messages": [*talk, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "1"}],
            "tools": tools,
        }

    rows = [
        row("sky", {"town": {"type": "string", "default": None, "enum": ["a", None]}}, {"town": "Oslo"}),
        row(
            "lamp", {"number": {"type": "integer"}, "on": {"type": "boolean", "const": None}}, {"number": 3, "on": True}
        ),
        row("stop", {"force": {"type": "boolean"}}, {}),
    ]
    json_path, parquet_path = tmp_path / "d.jsonl", tmp_path / "d.parquet"
    json_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet_path)
    read = [[row[2:] for row in read_rows(Source(path=str(path)))] for path in (json_path, parquet_path)]
    assert read[0][:2] == read[1][:2]
    assert '"default": null' in json.dumps(read[1][0])
    assert "null" not in json.dumps(read[1][1][0])
    assert read[1][2][0][1]["tool_calls"][0]["function"]["arguments"] == {}


def test_arrow_json_is_read_as_what_it_says(tmp_path):
    """The `datasets` library stores objects of differing keys so, such as the arguments of calls."""
    said = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['{"a": null}', None]))
    pyarrow.parquet.write_table(
        pyarrow.table({"s": pyarrow.StructArray.from_arrays([said], ["j"])}), tmp_path / "d.parquet"
    )
    assert list(read_file(tmp_path / "d.parquet")) == [(1, {"s": {"j": {"a": None}}}), (2, {"s": {}})]


def test_padding_of_rows_whose_types_are_not_known():
    row = {"a": None, "b": {"c": None, "d": [None, {"e": None, "f": 1}]}}
    assert unpadded()(row) == {"a": None, "b": {"d": [None, {"f": 1}]}}


def test_arrow_maps_keep_their_nulls_and_columns_stay(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    table = pyarrow.table({"m": pyarrow.array([[("a", None)]], kind), "text": ["t"], "none": pyarrow.nulls(1)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert list(read_file(tmp_path / "d.parquet")) == [(1, {"m": {"a": None}, "text": "t", "none": None})]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.csv", "text;label\na, b;1\nc, d;2\n", "semicolons"),
        ("a.csv", "text\tlabel\na, b\t1\nc\t2\n", "tabs"),
        ("a.csv", 'text|label\n"a | b"|1\nc|2\n', "bars"),
        ("a.csv", "text;label\n", "semicolons"),
        ("a.csv", "text, or so;label\na;1\nb, c, d;2\n", "semicolons"),
        ("a.tsv", "text;label\na\t, b;1\nc;2\n", "semicolons"),
        ("a.tsv", "text,label\na,1\n", "commas"),
        ("a.csv", "text,label;x\na,1\nb;c,2\n", ""),
        ("a.csv", "text\na; b\nc\n", ""),
        ("a.csv", "the text; in words\nOne\nTwo\n", ""),
        ("a.csv", "text,label\na;b\nc;d\n", ""),
        ("a.tsv", "text\tlabel\na, b\t1\nc, d\t1\n", ""),
        ("a.csv", 'text\n"broken', ""),
    ],
)
def test_what_parts_the_cells_of_a_table_is_told(tmp_path, name, content, note):
    path = put(tmp_path, name, content)
    assert delimiter_note(path, False) == (f"; its cells are parted by {note}" if note else "")
    if note:
        rows = list(read_file(path))
        assert all(len(row) == 2 for _, row in rows)
        assert len(rows) == content.count("\n") - 1


def test_a_header_that_no_row_bears_out(tmp_path):
    assert refusal(tmp_path, "a.csv", "text;label\na\nb\n").endswith(
        "; the header looks parted by semicolons, but no row has as many cells: mend the rows"
    )


def test_a_table_without_header_and_with_other_delimiters(tmp_path):
    path = put(tmp_path, "a.csv", "ham;Hello, you\nspam;Win\nham;a, b, c\n")
    columns = {"label": "column1", "text": "column2"}
    assert [row["column2"] for _, row in read_file(path, columns)] == ["Hello, you", "Win", "a, b, c"]
    path = put(tmp_path, "a.tsv", "Hello, you\nBye, you\n")
    assert [row["column1"] for _, row in read_file(path, {"text": "column1"})] == ["Hello, you", "Bye, you"]


@pytest.fixture
def tree(tmp_path):
    """Folders with links: `data/in` to a folder outside, two loops, a twin, one to nothing and one to a file."""
    for name in (
        "data/a/1.jsonl",
        "data/b.jsonl",
        "data/.hidden/x.jsonl",
        "out/2.jsonl",
        "out/deep/3.csv",
        "data/LICENSE.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        put(tmp_path, name, "x")
    for link, to in (
        ("data/in", "../out"), ("data/twin", "../out/deep"), ("data/loop", "."), ("data/a/up", "../.."),
        ("out/back", "../data"), ("data/gone.jsonl", "nowhere"), ("data/file.jsonl", "../out/2.jsonl"),
    ):  # fmt: skip
        (tmp_path / link).symlink_to(to)
    return tmp_path


def test_linked_folders_are_followed_once_and_never_in_circles(tree):
    found = survey(str(tree / "data"))
    names = [str(path.relative_to(tree / "data")) for path in found.paths]
    assert names == ["a/1.jsonl", "b.jsonl", "file.jsonl", "in/2.jsonl", "in/deep/3.csv"]
    said = "\n".join(found.remarks).replace(f"{tree}/", "")
    for line in (
        "data/loop: a link that is not followed: it leads to a folder around it",
        "data/a/up: a link that is not followed: it leads to a folder around it",
        "data/twin: a link that is not followed: its folder is read already",
        "data/in/back: a link that is not followed: its folder is read already",
        "data/gone.jsonl: this link leads to nowhere, which is not there",
    ):
        assert line in said
    (tree / "link").symlink_to("data")
    assert len(data_files(str(tree / "link"))) == 5
    with pytest.raises(UserError, match=r"gone.jsonl: this link leads to nowhere, which is not there; mend the link"):
        data_files(str(tree / "data/gone.jsonl"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("data/*.jsonl", ["data/b.jsonl", "data/c.jsonl"]),
        ("data/[ab]*", ["data/a/1.jsonl", "data/a/deep/3.csv", "data/b.jsonl"]),
        ("data/**/*.csv", ["data/a/deep/3.csv"]),
        ("**/a/*.jsonl", ["data/a/1.jsonl"]),
        ("**", ["data/a/1.jsonl", "data/a/deep/3.csv", "data/b.jsonl", "data/c.jsonl"]),
        ("*/?.jsonl", ["data/b.jsonl", "data/c.jsonl"]),
        ("data/a/../c.json*", ["data/a/../c.jsonl"]),
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, names):
    monkeypatch.chdir(tmp_path)
    for name in ("data/a/1.jsonl", "data/a/deep/3.csv", "data/b.jsonl", "data/c.jsonl", "data/.d.jsonl", "data/e.doc"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        put(tmp_path, name, "x")
    Path("data/loop").symlink_to(".")
    assert [str(path) for path in data_files(pattern)] == names


def test_a_pattern_without_a_match_and_a_name_with_its_letters(tmp_path):
    with pytest.raises(UserError, match=r"no data file matches this pattern; `\*` stands for"):
        data_files(str(tmp_path / "*.jsonl"))
    path = put(tmp_path, "a[1]*.jsonl", '{"text": "a"}')
    assert data_files(str(path)) == [path]
    assert list(read_rows(Source(path=str(path)))) == [Row(str(path), 1, None, "a", None)]


@pytest.mark.parametrize(
    "path",
    ["x" * 5000, "y/" * 3000 + "a.jsonl", "nul\0.jsonl", "half\ud800.jsonl", "line\u2028.jsonl", "", "\x1b[2J.csv"],
)
def test_paths_that_are_none(path):
    with pytest.raises(UserError) as caught:
        data_files(path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].isprintable()
    assert len(caught.value.problems[0]) < 500
    is_hub_id(path)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe.jsonl: neither a file nor a folder"):
        data_files(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(UserError, match="the folder has no data file"):
        data_files(str(tmp_path))
    (tmp_path / "mem.jsonl").symlink_to("/proc/self/mem")  # it is there, and reading it fails
    with pytest.raises(UserError, match=r"mem.jsonl: cannot be read: "):
        list(read_rows(Source(path=str(tmp_path / "mem.jsonl"))))
    with pytest.raises(UserError, match=r"mem.jsonl: cannot be read: "):
        stored(Source(path=str(tmp_path / "mem.jsonl")), tiny_tokenizer(SMOLLM), conversations("last"), tmp_path / "c")
