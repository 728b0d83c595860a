"""`align.prepare` on small sets: whole runs, broken ones, wrong input; and its steps inside a stage."""

from __future__ import annotations

import errno
import json
import shutil
from importlib.util import find_spec

import pytest
import yaml
from world import align, lines, tree, write_rows

from align import prepare, sft
from align.data.formats.formats import read_rows
from align.data.preparing.reading import ALL
from align.data.preparing.spool import Spool
from align.recipe.schema import Source

WORDS = [
    "harbour",
    "boat",
    "gull",
    "water",
    "north",
    "net",
    "wind",
    "rope",
    "calm",
    "night",
    "weather",
    "people",
    "man",
]


def said(i: int, n: int = 14) -> str:
    """Different words for each i."""
    return " ".join(f"{WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)]}{(i * k) % 97}" for k in range(n))


def talk(asked: str, answer: str, **more):
    return {**more, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Sources of several formats, more rows than one batch has, with known faults and duplicates."""
    folder = tmp_path_factory.mktemp("raw")
    talks = [talk(f"ask {said(i, 8)}", said(i), id=i) for i in range(520)]
    talks += [talk(f"Ask {said(i, 8).upper()}?", said(i), id=i) for i in range(40)]
    talks += [{"messages": [{"role": "user", "content": "no answer"}]}, "{broken", talk("Mail", "To jo@example.org.")]
    write_rows(folder / "talks.jsonl", talks)
    pairs = [{"prompt": f"why {said(i, 6)}", "chosen": said(i), "rejected": said(i + 1)} for i in range(30)]
    write_rows(folder / "pairs.jsonl", pairs + pairs[:5])
    (folder / "texts.txt").write_text("\n\n".join(said(i, 20) for i in range(20)) + "\n\nI am {{name}}.\n", "utf-8")
    return folder


def recipe(here, raw, **more):
    filled = {
        "stage": "prepare",
        "run": str(here / "set"),
        "invalid": "drop",
        "sources": [{"path": str(raw / name)} for name in ("talks.jsonl", "pairs.jsonl", "texts.txt")],
        "prepare": {
            "filter": {"placeholders": True},
            "privacy": {},
            "deduplicate": {"near": {"threshold": 0.8}},
        },
        "output": {"format": "jsonl", "shard_rows": 300, "keep": ["id"], "split": {"eval": 0.1}},
        "card": False,
        "workers": 1,
        **more,
    }
    path = here / "data.yaml"
    path.write_text(yaml.safe_dump(filled), "utf-8")
    return path


def files_of(folder):
    """Every file but those that name the recipe: run, workers and engine stand in it."""
    return {name: data for name, data in tree(folder).items() if name not in ("recipe.yaml", "report.html")}


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """A finished set: its folder, and what was said."""
    here = tmp_path_factory.mktemp("whole")
    told = align(recipe(here, raw), stage=prepare)
    assert told.status == 0, told.err
    return here / "set", told.out


def test_a_set_is_what_its_manifest_says(raw, whole):
    folder, out = whole
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["records"], manifest["invalid"]) == (563 + 35 + 21, 2)
    dropped = {step["name"]: sum(step["dropped"].values()) for step in manifest["steps"]}
    assert dropped["filter.placeholders"] == 1
    assert dropped["deduplicate.exact"] == 45
    rows = {side: sum(file["rows"] for file in files) for side, files in manifest["sides"].items()}
    assert sum(rows.values()) == 619 - 2 - sum(dropped.values())
    assert rows["eval"] == round(0.1 * sum(rows.values()))
    assert "45 dropped" in out
    for files in manifest["sides"].values():
        for file in files:
            data = (folder / file["name"]).read_bytes()
            assert len(data) == file["bytes"]
            assert data.count(b"\n") == file["rows"]
    ledger = lines(folder / "ledger.jsonl")
    gone = [entry for entry in ledger if entry["action"] == "dropped"]
    assert len(gone) == 2 + sum(dropped.values())
    exact = next(entry for entry in gone if entry["reason"].startswith("deduplicate.exact"))
    assert exact["file"].endswith("talks.jsonl")
    assert (exact["line"], exact["reason"].rpartition("talks.jsonl:")[2]) == (521, "1")
    assert not list(folder.glob(".*"))


def test_no_private_value_is_left_anywhere(whole):
    folder, out = whole
    assert all(b"jo@example.org" not in data for data in tree(folder).values())
    assert "jo@example" not in out
    rows = [row for file in folder.glob("*/messages-*.jsonl") for row in lines(file)]
    (mail,) = [row for row in rows if row["messages"][0]["content"] == "Mail"]
    assert mail["messages"][1]["content"] == "To <EMAIL_1>."


def test_the_set_reads_back_as_its_rows(raw, whole):
    folder, _ = whole
    rows = {
        (json.dumps(row.messages), row.text, json.dumps(row.answers))
        for name in ("talks.jsonl", "pairs.jsonl", "texts.txt")
        for row in read_rows(Source(path=str(raw / name)), ALL)
        if hasattr(row, "messages")
    }
    kept = 0
    for row in read_rows(Source(path=str(folder / "train")), ALL):
        key = json.dumps(row.messages), row.text, json.dumps(row.answers)
        assert key in rows or "<EMAIL_1>" in key[0]
        kept += 1
    assert kept > 400
    sides = [list(read_rows(Source(path=str(folder / side)), ALL)) for side in ("train", "eval")]
    train, held = ({json.dumps(row.messages[0] if row.messages else row.text) for row in side} for side in sides)
    assert not train & held
    first = lines(sorted((folder / "train").glob("messages-*"))[0])[0]
    assert first["id"] in (0, 1, 2), "a column that is kept"


def test_a_run_that_ends_anywhere_goes_on_to_the_same_bytes(raw, whole, here, monkeypatch):
    """As a kill would: it ends right after some batch, file or step was noted, and may leave a part of the next."""
    path, add, left, ends = recipe(here, raw), Spool.add, 0, 0

    def torn(self, *given):
        nonlocal left
        add(self, *given)
        left -= 1
        if left < 0:  # batch after batch of what is left to do
            (self.folder / "rows.jsonl").open("ab").write(b'{"torn')
            raise KeyboardInterrupt

    monkeypatch.setattr(Spool, "add", torn)
    for attempt in range(20):
        left = attempt % 3
        told = align(path, stage=prepare)
        if told.status == 0:
            break
        ends += 1
        assert not (here / "set" / "manifest.json").exists()
    assert told.status == 0
    assert ends > 3
    assert files_of(here / "set") == files_of(whole[0])


def test_a_whole_set_that_was_not_put_into_place_is(raw, whole, here, monkeypatch):
    path = recipe(here, raw)
    shutil.copytree(whole[0], here / "set")
    told = align(path, "seed=1", stage=prepare)
    assert told.status == 2
    assert "holds a set of another recipe" in told.err
    old = files_of(here / "set")
    real, left = type(here).replace, 0

    def ends(self, target):
        nonlocal left
        left -= ".preparing" in str(self) and ".writing" not in str(self)
        if left < 0:
            raise KeyboardInterrupt
        return real(self, target)

    for after in (2, 6):  # files that were renamed before the end
        left = after
        monkeypatch.setattr(type(here), "replace", ends)
        assert align(path, "seed=1", "--fresh", stage=prepare).status == 130
        monkeypatch.setattr(type(here), "replace", real)
        told = align(path, "seed=1", stage=prepare)
        assert (told.status, "nothing to do" in told.out) == (0, True), told.err
        new = files_of(here / "set")
        assert new.keys() >= {"manifest.json", "ledger.jsonl"}
        assert new != old
        manifest = json.loads(new["manifest.json"])
        named = {file["name"] for files in manifest["sides"].values() for file in files}
        assert {name for name in new if "/" in name} == named
        shutil.rmtree(here / "set")
        shutil.copytree(whole[0], here / "set")


def test_it_is_made_once_and_parquet_holds_the_same_rows(raw, whole, here):
    path = recipe(here, raw)
    told = align(path, "output.format=parquet", "output.shard_rows=2000", stage=prepare)
    assert told.status == 0, told.err
    before = tree(here / "set")
    told = align(path, "output.format=parquet", "output.shard_rows=2000", "workers=7", stage=prepare)
    assert (told.status, "nothing to do" in told.out) == (0, True)
    assert tree(here / "set") == before
    bare = {"file": "", "line": 0}
    for side in ("train", "eval"):
        ours, theirs = (
            sorted(map(repr, (row._replace(**bare) for row in read_rows(Source(path=str(folder / side)), ALL))))
            for folder in (here / "set", whole[0])
        )
        assert ours == theirs


def test_a_dry_run_counts_and_writes_nothing(raw, here):
    told = align(recipe(here, raw), "--dry-run", stage=prepare)
    assert told.status == 0, told.err
    assert "deduplicate.exact: 45 dropped" in told.out
    assert "dry run:" in told.out
    assert not (here / "set").exists()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (b'{"text": "fine"}\n\xff\xfe\x00\x01binary\n', "rows.jsonl:2: not UTF-8"),
        (b'{"text": "gr\xfc\xdfe"}\n', "rows.jsonl:1: not UTF-8"),
        (b"\x00\x01\x02\x03" * 100, "rows.jsonl:1: broken JSON"),
        (b"", "holds no rows"),
        (b'{"text": ""}\n{"text": 3}\n', "2 rows cannot be taken"),
        (b'{"chat": 3}\n', "no format fits its columns"),
    ],
)
def test_wrong_rows(rows, told, here):
    (here / "rows.jsonl").write_bytes(rows)
    path = here / "data.yaml"
    path.write_text("stage: prepare\nrun: set\nsources: [{path: rows.jsonl}]\nworkers: 1\n")
    found = align(path, stage=prepare)
    assert found.status == 2
    assert told in found.err
    assert "Traceback" not in found.err
    assert not (here / "set" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("prepare.deduplicate.near.threshold=2", "prepare.deduplicate.near.threshold: expected a number"),
        ("prepare.filters.min_words=2", "did you mean 'filter'"),
        ("output.split={train: 0.1}", "name the other sides alone"),
        ("output.split={eval: 0.6, test: 0.5}", "leave nothing for `train`"),
        ("output.split={../x: 0.1}", "output.split.../x"),
        ("prepare.filter.gopher_repetition.max_top_ngrams={two: 0.1}", "expected a length in words"),
        ("prepare.filter.functions=[nowhere:f]", "nowhere cannot be imported"),
        ("prepare.filter.min_words=100000", "no row is left"),
        ("engine=ray", "pip install 'align[prepare-ray]'"),
        ("workers=0", "workers: expected a whole number above 0"),
        ("prepare.filter.languages=[english]", "prepare.filter.languages.0"),
        ("run=raw/set", "run: raw/set lies in raw, a source"),
        ("run=raw/talks.jsonl/set", "which is a file"),
        ("stage=sft", "this is a recipe of stage 'sft'"),
    ],
)
def test_wrong_recipes(keys, told, raw, here):
    (here / "raw").symlink_to(raw)
    sources = [{"path": "raw" if keys == "run=raw/set" else str(raw / "texts.txt")}]
    if keys.startswith("engine") and find_spec("ray"):
        pytest.skip("ray is installed")
    found = align(recipe(here, raw, sources=sources), keys, stage=prepare)
    assert found.status == 2, found.out
    assert told in found.err


def test_a_folder_of_somebody_else(raw, here):
    (here / "set").mkdir()
    (here / "set" / "thesis.txt").write_text("mine")
    found = align(recipe(here, raw), "--fresh", stage=prepare)
    assert (found.status, "holds files but no prepared set" in found.err) == (2, True)
    assert [path.name for path in (here / "set").iterdir()] == ["thesis.txt"]


def few(here, rows, **more):
    """A recipe for these rows, lines of bytes."""
    (here / "rows.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    filled = {
        "stage": "prepare", "run": "set", "sources": [{"path": "rows.jsonl"}], "workers": 1, "card": False,
        "output": {"format": "jsonl"}, **more,
    }  # fmt: skip
    (here / "data.yaml").write_text(yaml.safe_dump(filled), "utf-8")
    return here / "data.yaml"


def test_lines_in_another_encoding_are_dropped_one_by_one_where_that_is_asked_for(here):
    rows = [b'{"text": "fine"}', b'{"text": "gr\xfc\xdfe"}', b"\x00\x01\xff\xfe", '{"text": "grüße"}'.encode()]
    told = align(few(here, rows, invalid="drop"), stage=prepare)
    assert told.status == 0, told.err
    assert [row["text"] for row in lines(here / "set/train/text-00000.jsonl")] == ["fine", "grüße"]
    ledger = lines(here / "set/ledger.jsonl")
    assert [(entry["line"], "not UTF-8 (byte 0x" in entry["reason"]) for entry in ledger] == [(2, True), (3, True)]


def test_a_set_that_lacks_a_file_is_made_again_and_a_torn_state_is_started_over(here):
    path = few(here, [b'{"text": "one row"}', b'{"text": "another row"}'])
    assert align(path, stage=prepare).status == 0
    whole = files_of(here / "set")
    for spoil in (lambda: (here / "set/train/text-00000.jsonl").unlink(),
                  lambda: (here / "set/train/text-00000.jsonl").write_bytes(b"{}\n")):  # fmt: skip
        spoil()
        told = align(path, stage=prepare)
        assert (told.status, "is not as it was written; the set is made again" in told.out) == (0, True)
        assert files_of(here / "set") == whole
    (here / "set/.preparing").mkdir()
    (here / "set/.preparing/manifest.json").write_text("{}")
    told = align(path, "--fresh", stage=prepare)
    assert told.status == 0, told.err
    assert files_of(here / "set") == whole
    assert not (here / "set/.preparing").exists()


def test_a_function_that_has_changed_makes_another_set(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "kept_rows.py").write_text("def good(row):\n    return 'one' in row['text']\n")
    path = few(here, [b'{"text": "one"}', b'{"text": "two"}'], prepare={"filter": {"functions": ["kept_rows:good"]}})
    told = align(path, stage=prepare)
    assert (told.status, "1 dropped" in told.out) == (0, True)
    (here / "kept_rows.py").write_text("def good(row):\n    return True\n")
    told = align(path, stage=prepare)
    assert (told.status, "holds a set of another recipe" in told.err) == (2, True)


def test_a_full_disk_is_told_with_its_folder_and_the_run_goes_on_once_there_is_room(raw, whole, here, monkeypatch):
    add = Spool.add

    def full(self, *given):
        if len(self.batches) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *given)

    monkeypatch.setattr(Spool, "add", full)
    told = align(recipe(here, raw), stage=prepare)
    assert told == (2, "", f"{here / 'set'}: No space left on device; make room there, or use another folder\n")
    monkeypatch.setattr(Spool, "add", add)
    assert align(recipe(here, raw), stage=prepare).status == 0
    assert files_of(here / "set") == files_of(whole[0])


def test_help_and_schema():
    found = align("--help", stage=prepare)
    assert found.status == 0
    told = " ".join(found.out.split())
    assert "prepare.deduplicate.near.threshold: a number above 0 and below 1, default 0.7" in told
    assert json.loads(align("--schema", stage=prepare).out)["title"] == "Recipe"


def test_a_stage_takes_its_rows_through_the_same_steps(world, here):
    rows = [json.loads(line) for line in world.talks.read_text("utf-8").splitlines()]
    mail = talk("Mail?", "jo@example.org")
    refusal = talk("x", "I'm sorry, but I can't.")
    write_rows(here / "rows.jsonl", [*rows, *rows[:3], mail, refusal])
    path = world.recipe(here / "sft.yaml", data={"train": [{"path": str(here / "rows.jsonl")}]}, train={"steps": 1})
    section = "data.prepare={filter: {refusals: true}, privacy: {}, deduplicate: {}}"
    found = align(path, f"run={here / 'run'}", section, stage=sft)
    assert found.status == 0, found.err
    held = len(world.held.read_text("utf-8").splitlines())
    assert f"{len(rows) + held + 5} rows read, 4 dropped (1 filter.refusals, 3 deduplicate.exact)" in found.out
    ledger = lines(here / "run" / "ledger.jsonl")
    assert [entry["action"] for entry in ledger].count("dropped") == 4
    (changed,) = [entry for entry in ledger if entry["action"] == "changed"]
    assert (changed["line"], changed["reason"].startswith("privacy: ")) == (len(rows) + 4, True)
    again = align(path, f"run={here / 'other'}", section, "--show", stage=sft)
    assert "jo@example.org" not in again.out
    found = align(path, f"run={here / 'third'}", "data.prepare={filter: {perplexity: {model: x, max: 3}}}", stage=sft)
    assert (found.status, "run align.prepare before it" in found.err) == (2, True)
