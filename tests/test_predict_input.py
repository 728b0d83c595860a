"""Whatever stands in the input of `--predict`, each row comes out once, with its label or with the reason on stderr."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from often import REPEATS
from world import Told, align, write_rows

from align import classify
from align.training.labelling import predict
from align.training.labelling.classifier import Classifier

ROWS = [{"label": "spam" if n % 2 else "ham", "text": f"{'Name' if n % 2 else 'Say'} the city {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def run(world, cache, tmp_path_factory) -> Path:
    """A finished run of one step, whose eval rows are all ham and whose test rows are all spam."""
    folder = tmp_path_factory.mktemp("predict")
    train, held, test = (
        {"path": str(write_rows(folder / f"{name}.jsonl", rows))}
        for name, rows in (("train", ROWS), ("held", ROWS[:4:2]), ("test", ROWS[1:4:2]))
    )
    path = world.recipe(
        folder / "recipe.yaml",
        stage="classify",
        data={"train": [train], "eval": {"sources": [held], "overlap": "keep"}},
        classify={"labels": ["ham", "spam"], "test": {"sources": [test]}},
        train={"steps": 1, "eval_every": None, "save_every": None},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        told = align(path, stage=classify)
    assert told.status == 0, told.err
    assert "auroc –" in told.out
    return folder / "run"


@pytest.fixture(scope="module")
def classifier(run) -> Classifier:
    return Classifier(run / "final")


@pytest.fixture
def final(run, classifier, monkeypatch) -> Path:
    """Its result, which is loaded once for all tests."""
    monkeypatch.setattr(predict, "Classifier", lambda *_: classifier)
    return run / "final"


def predicted(final: Path, *argv: object, stdin: bytes = b"") -> Told:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return align("--predict", final, *argv, stage=classify)


def rows_of(told: Told) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(told.out)))


def test_measures_that_are_not_defined_are_null(run):
    """In every line of every file; and a line is written once, though a resume writes it again."""
    for path in (*run.rglob("*.json"), *run.rglob("*.jsonl")):
        text = path.read_text("utf-8")
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(line, parse_constant=pytest.fail)
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert (last["split"], last["auroc"], last["auprc"]) == ("test", None, 1.0)
    splits = json.loads((run / "classification.json").read_text("utf-8"))["splits"]
    assert splits["eval"]["figures"]["auroc"] is None


LINES = [  # of JSONL, and why a row has no label
    (b'{"text": "Name it"}', None),
    (b'{"text": "half \\ud800"}', "surrogates not allowed"),
    (b'{"text": 1}', "found the number 1"),
    (b"[1]", "expected a row of named columns"),
    (b"{bad", "broken JSON"),
    (b"\xff", "not UTF-8 (byte 0xff"),
    (b"[" * 5000, "broken JSON"),
    (b'{"text": ""}', "found an empty text"),
    (b'{"other": "x"}', "expected text, found nothing"),
    ('{"text": "a\u2028b\x85c"}'.encode(), None),
    (b'{"text": "\\u001b]0;t\\u0007\\u0000"}', None),
    (b'{"\\u001b[2J": 1, "text": ["\\u001b[2J"]}', "the list ['\\x1b[2J']"),
    (b'{"text": "Say it"}', None),
]


def test_every_row_comes_out_once(final, here):
    (here / "rows.jsonl").write_bytes(b"\n".join(line for line, _ in LINES))
    told = predicted(final, here / "rows.jsonl")
    assert told.status == 0, told.err
    assert [(int(row["line"]), bool(row["label"])) for row in rows_of(told)] == [
        (number, why is None) for number, (_, why) in enumerate(LINES, 1)
    ]
    *faults, last = told.err.splitlines()
    reasons = [(number, why) for number, (_, why) in enumerate(LINES, 1) if why]
    for fault, (number, why) in zip(faults, reasons, strict=True):
        assert fault.startswith(f"{here}/rows.jsonl:{number}: ")
        assert why in fault
    assert last == f"{here}/rows.jsonl: {len(reasons)} rows without a label"
    assert "\x1b" not in told.err


@pytest.mark.parametrize(
    ("name", "content", "written", "said"),
    [
        ("a.txt", b"one\ntwo\n\xff\nfour\n", 2, "a.txt:3: not UTF-8"),
        ("a.csv", b'text\none\n"two\n', 1, "a.csv:3: broken CSV"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}, {', 2, "a.json:1: broken JSON"),
        ("a.csv.gz", b"text", 0, "broken gzip"),
    ],
)
def test_rows_before_a_fault_have_their_labels(final, here, name, content, written, said):
    """What no later line can mend ends the reading, with status 2."""
    (here / name).write_bytes(content)
    told = predicted(final, name)
    assert told.status == 2
    assert said in told.err
    assert len(rows_of(told)) == written
    assert all(row["label"] for row in rows_of(told))
    assert not written or f"{name}: stopped there; {written} rows before it are written" in told.err


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.csv", b"text\n"), ("a.txt", b"\n\n"[:0])])
def test_a_file_without_rows_is_told(final, here, name, content):
    (here / name).write_bytes(content)
    told = predicted(final, name)
    assert (told.status, rows_of(told)) == (0, [])
    assert told.err == f"{name}: there is no row in it\n"


def test_a_line_of_the_standard_input_that_is_no_text(final):
    told = predicted(final, "--format", "jsonl", stdin=b"\xef\xbb\xbfName it\r\nx\xff\n\nlast")
    assert [json.loads(line)["label"] is None for line in told.out.splitlines()] == [False, True, True, False]
    assert "<stdin>:2: not UTF-8 (byte 0xff)" in told.err


def test_a_score_that_is_not_finite_is_no_label(final, here, monkeypatch):
    whole = Classifier.probabilities

    def broken(self, texts):
        return np.where([["nan" in text] for text in texts], np.nan, whole(self, texts))

    monkeypatch.setattr(Classifier, "probabilities", broken)
    told = predicted(final, stdin=b"Name it\nnan\nSay it\n")
    assert [bool(row["label"]) for row in rows_of(told)] == [True, False, True]
    assert "<stdin>:2: the model's scores of it are not finite" in told.err


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([]) | st.just("\udc80")
ANY = st.one_of(
    st.dictionaries(st.sampled_from(["text", "x", "\x1b"]), VALUES, max_size=2).map(
        lambda row: json.dumps(row).encode()
    ),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"{", b"]", b"[", b'"', b"text", b"a,b", b"\t", b"\r", b"", b'{"text": "Name it"}']),
)
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def check_any(final: Path, here: Path, rows: list[bytes], name: str) -> None:
    """Status 0 with a line for each row, or 2 with a reason, and the rows before it."""
    content = b"\n".join(rows)
    (here / name).write_bytes(content)
    told = predicted(final, stdin=content) if name == "-" else predicted(final, name)
    assert told.status in (0, 2), told
    assert "Traceback" not in told.err
    found = rows_of(told)
    lost = [row for row in found if not row["label"]]
    if told.status == 2:
        assert told.err.strip()
    elif name == "-":
        assert [int(row["line"]) for row in found] == [n + 1 for n in range(len(io.BytesIO(content).readlines()))]
    else:
        assert found or "there is no row in it" in told.err
    assert len(lost) == sum(f":{row['line']}: " in told.err for row in lost)
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in told.err)


names = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "-"])


@settings(max_examples=150, **FUZZ)
@given(rows=st.lists(ANY, max_size=5), name=names)
def test_any_input(final, here, rows, name):
    check_any(final, here, rows, name)


@pytest.mark.slow
@pytest.mark.timeout(900 * REPEATS)
@settings(max_examples=2000 * REPEATS, **FUZZ)
@given(rows=st.lists(ANY, max_size=5), name=names)
def test_any_input_at_length(final, here, rows, name):
    check_any(final, here, rows, name)
