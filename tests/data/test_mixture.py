import io
import json
import random
import shutil
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from data.voices import VOICES
from rich.console import Console

from align.data.examples import Ledger
from align.data.formats.formats import read_rows
from align.data.mixture import counting, prepare
from align.data.store import COLUMNS, Store, stored
from align.data.templates.render import conversations, render
from align.recipe.errors import UserError
from align.recipe.schema import Data, Source

PROMPTS = 40


def _chat(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def tokenizer():
    return VOICES["smollm"].tokenizer()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 prompts with two answers each in `chat.jsonl`; ten other rows in `other.jsonl`."""
    rows = [_chat(f"question {i % PROMPTS}", f"answer {i}, 春天 🌸") for i in range(2 * PROMPTS)]
    _save(tmp_path / "chat.jsonl", rows)
    _save(tmp_path / "other.jsonl", [_chat(f"other {i}", "yes" * (i + 1)) for i in range(10)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _data(*paths: str, **fields) -> Data:
    train = [Source(path=path) for path in paths or ("chat.jsonl",)]
    return Data(train=train, **{"max_length": 400} | fields)


def _prepare(data, tokenizer, folder, seed=3, **more):
    return prepare(data, tokenizer, conversations("assistant"), seed, folder / "cache", **more)


def _prompts(examples, tokenizer) -> set[str]:
    texts = (tokenizer.decode(examples.tree(i).segments[0]) for i in range(len(examples)))
    return {text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts}


def _places(examples) -> list[str]:
    return [examples.where(i) for i in range(len(examples))]


def assert_same_tree(mine, theirs):
    for parts, others in zip(mine[:2], theirs[:2], strict=True):
        for part, other in zip(parts, others, strict=True):
            np.testing.assert_array_equal(part, other)
    assert mine.targets == pytest.approx(theirs.targets, rel=1e-6)


def test_every_tree_is_the_rendered_row(folder, tokenizer):
    examples = _prepare(_data(), tokenizer, folder).train
    rows = list(read_rows(Source(path="chat.jsonl")))
    assert len(examples) == len(rows)
    for i, row in enumerate(rows):
        (tokens,), (trained,), *_ = examples.tree(i)
        expected = render(row, tokenizer, "assistant")
        np.testing.assert_array_equal(tokens, expected.segments[0])
        np.testing.assert_array_equal(trained, expected.trained[0])
        assert (examples.lengths[i], examples.labels[i]) == (len(tokens), trained.sum())
        assert examples.where(i) == f"{row.file}:{row.line}"


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_no_prompt_stands_on_both_sides(folder, tokenizer, fraction):
    made = _prepare(_data(eval={"fraction": fraction}), tokenizer, folder)
    assert not _prompts(made.train, tokenizer) & _prompts(made.eval, tokenizer)
    assert len(made.eval) == round(fraction * 80)
    assert sorted(_places(made.train) + _places(made.eval)) == sorted(f"chat.jsonl:{i + 1}" for i in range(80))


def test_the_split_depends_on_the_seed_alone(folder, tokenizer):
    data = _data(eval={"fraction": 0.2})
    np.random.seed(1)
    random.seed(1)
    first = _places(_prepare(data, tokenizer, folder).eval)
    np.random.seed(2)
    random.seed(2)
    assert _places(_prepare(data, tokenizer, folder).eval) == first
    assert _places(_prepare(data, tokenizer, folder, seed=4).eval) != first


def test_a_split_that_one_prompt_spoils(folder, tokenizer):
    _save(folder / "one.jsonl", [_chat("same  question", "a"), _chat("same question", "b")])
    with pytest.raises(UserError, match="all rows share one prompt"):
        _prepare(_data("one.jsonl", eval={"fraction": 0.5}), tokenizer, folder)


def test_a_tiny_fraction_still_holds_a_row_out(folder, tokenizer):
    made = _prepare(_data("other.jsonl", eval={"fraction": 0.001}), tokenizer, folder)
    assert (len(made.train), len(made.eval)) == (9, 1)


def test_eval_sources_take_their_prompts_out_of_train(folder, tokenizer):
    _save(folder / "held.jsonl", [_chat("question 7", "x"), _chat("unseen", "y")])
    made = _prepare(_data(eval={"sources": [Source(path="held.jsonl")]}), tokenizer, folder)
    assert (len(made.train), len(made.eval)) == (78, 2)
    assert [(e["line"], e["action"]) for e in made.ledger.entries] == [(8, "dropped"), (48, "dropped")]
    assert "its prompt is in the eval set" in made.ledger.entries[0]["reason"]


def test_eval_max_rows(folder, tokenizer):
    made = _prepare(_data(eval={"fraction": 0.5, "max_rows": 6}), tokenizer, folder)
    assert (len(made.train), len(made.eval)) == (74, 6)
    eval_ = {"sources": [Source(path="chat.jsonl")], "max_rows": 6}
    made = _prepare(_data("other.jsonl", eval=eval_), tokenizer, folder)
    assert (len(made.train), len(made.eval), made.ledger.count("dropped")) == (10, 6, 74)


def test_order_is_a_pure_function_of_seed_and_epoch(folder, tokenizer):
    examples = _prepare(_data("chat.jsonl", "other.jsonl"), tokenizer, folder).train
    first = examples.order(5, 1)
    np.random.seed(0)
    examples.order(9, 0)
    np.testing.assert_array_equal(examples.order(5, 1), first)
    np.testing.assert_array_equal(np.sort(first), np.arange(90))
    assert (examples.order(5, 2) != first).any()
    assert ((examples.order(5, 2) >= 80) != (first >= 80)).any(), "each epoch mixes the sources anew"
    assert (examples.order(6, 1) != first).any()
    assert (np.diff(first >= 80) != 0).sum() > 6, "the sources are interleaved, not one after the other"


@pytest.mark.parametrize(("weight", "per_epoch", "epochs"), [(2.0, 20, 1), (0.5, 5, 2), (1.5, 15, 2), (0.3, 3, 10)])
def test_weights_are_passes_over_a_source(folder, tokenizer, weight, per_epoch, epochs):
    train = [Source(path="chat.jsonl"), Source(path="other.jsonl", weight=weight)]
    examples = _prepare(Data(train=train), tokenizer, folder).train
    orders = [examples.order(0, epoch) for epoch in range(epochs)]
    assert [len(order) for order in orders] == [80 + per_epoch] * epochs
    seen = Counter(np.concatenate(orders).tolist())
    assert {seen[i] for i in range(80)} == {epochs}
    assert {seen[i] for i in range(80, 90)} == {per_epoch * epochs // 10}, "every row comes equally often"
    assert all(set(a[a >= 80]) != set(b[b >= 80]) for a, b in pairwise(orders) if weight < 1)


def test_an_epoch_without_end_is_refused(folder, tokenizer):
    data = _data().model_copy(update={"train": [Source(path="chat.jsonl", weight=1e300)]})
    with pytest.raises(UserError, match=r"data\.train: by these weights an epoch has 8e\+301 rows"):
        _prepare(data, tokenizer, folder)


def test_weights_by_tokens_are_shares_of_an_epochs_tokens(folder, tokenizer):
    """By hand: of T tokens in all, 3/4 T are of the first source, which has t of them: 3/4 T / t passes."""
    train = [Source(path="chat.jsonl", weight=3), Source(path="other.jsonl", weight=1)]
    made = _prepare(Data(train=train, weigh_by="tokens", eval={"fraction": 0.1}), tokenizer, folder)
    examples, sizes = made.train, np.diff(made.train.starts)
    tokens = np.array(examples.tokens)
    np.testing.assert_allclose(examples.passes, np.array([0.75, 0.25]) * tokens.sum() / tokens)
    orders = [examples.order(0, epoch) for epoch in range(40)]
    rows = [[(order < sizes[0]).sum(), (order >= sizes[0]).sum()] for order in orders]
    assert rows == [np.round(examples.passes * sizes).tolist()] * 40, "every epoch is as long"
    seen = np.concatenate(orders)
    share = examples.lengths[seen[seen < sizes[0]]].sum() / examples.lengths[seen].sum()
    assert share == pytest.approx(0.75, abs=0.01)
    counts = np.bincount(seen, minlength=len(examples))
    assert np.ptp(counts[: sizes[0]]) <= 1, "every row of a source comes equally often"
    assert np.ptp(counts[sizes[0] :]) <= 1
    (line,) = [line for line in made.summary if line.startswith("train: chat.jsonl: ")]
    assert "75.0 % of the tokens wanted" in line
    by_rows = _prepare(Data(train=train, eval={"fraction": 0.1}), tokenizer, folder).train
    assert by_rows.passes.tolist() == [3, 1]


def test_a_cache_hit_tokenises_nothing_and_gives_the_same(folder, tokenizer):
    _save(
        folder / "bad.jsonl",
        [
            {"messages": []},
            _chat("a", "b"),
            {"messages": [*_chat("c", "d")["messages"], *_chat("e", "f")["messages"][:1]]},
        ],
    )
    data = _data("bad.jsonl", "chat.jsonl", invalid="drop", eval={"fraction": 0.2})
    told = []
    first = _prepare(data, tokenizer, folder, progress=lambda source, rows: told.append((source, rows)))
    assert told == [("tokenising bad.jsonl", 3), ("tokenising chat.jsonl", 80)]
    other_limits = data.model_copy(update={"max_length": 399, "overlong": "drop"})
    for same in (data, other_limits):
        again = _prepare(same, tokenizer, folder, progress=lambda *_: told.append("again"))
        assert again.summary == first.summary
        assert again.ledger.entries == first.ledger.entries
        assert {entry["action"] for entry in again.ledger.entries} == {"dropped", "repaired"}
        for mine, theirs in ((again.train, first.train), (again.eval, first.eval)):
            assert _places(mine) == _places(theirs)
            for i in range(len(mine)):
                assert_same_tree(mine.tree(i), theirs.tree(i))
    assert len(told) == 2


def test_the_cache_sees_what_the_tokens_depend_on(folder, tokenizer):
    cache, source = folder / "cache", Source(path="chat.jsonl")

    def stores() -> int:
        return len(list((cache / "tokens").iterdir()))

    stored(source, tokenizer, conversations("assistant"), cache)
    stored(source, tokenizer, conversations("last"), cache)
    stored(source, VOICES["marked"].tokenizer(), conversations("assistant"), cache)
    stored(source.model_copy(update={"limit": 5}), tokenizer, conversations("assistant"), cache)
    assert stores() == 4
    with (folder / "chat.jsonl").open("a") as file:
        file.write(json.dumps(_chat("new", "row")) + "\n")
    assert len(stored(source, tokenizer, conversations("assistant"), cache).line) == 81
    stored(source.model_copy(update={"weight": 2.0}), VOICES["smollm"].tokenizer(), conversations("assistant"), cache)
    assert stores() == 5, "a weight changes no token"


@pytest.mark.parametrize("file", ["tokens.bin", "trained.bin", "index.npz", "about.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_store_is_built_anew(folder, tokenizer, file, damage):
    source = Source(path="other.jsonl")
    before = stored(source, tokenizer, conversations("assistant"), folder / "cache")
    (path,) = (folder / "cache/tokens").glob(f"*/{file}")
    whole = path.read_bytes()
    copy = np.array(before.tokens), np.array(before.trained)
    path.unlink()
    if damage != "gone":
        half = len(whole) // 2
        path.write_bytes(whole[:half] + (bytes([whole[half] ^ 1]) + whole[half + 1 :] if damage == "flip" else b""))
    after = stored(source, tokenizer, conversations("assistant"), folder / "cache")
    np.testing.assert_array_equal(after.tokens, copy[0])
    np.testing.assert_array_equal(after.trained, copy[1])
    assert (after.faults, after.repairs, after.found) == (before.faults, before.repairs, before.found)
    assert path.read_bytes() == whole or file == "index.npz"


def test_a_failed_build_leaves_nothing(folder, tokenizer):
    def killed(source, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prepare(_data(), tokenizer, folder, progress=killed)
    assert list((folder / "cache/tokens").iterdir()) == []


def test_a_store_holds_trees_with_branches():
    index = {name: np.zeros(0, np.int64) for name in COLUMNS}
    index |= {"segments": np.array([0, 2, 5, 6, 8]), "examples": np.array([0, 3, 4])}
    store = Store(
        np.arange(8, dtype=np.int32), np.arange(8) > 1, **index, files=[], found=[], faults=[], repairs=[], remarks=[]
    )
    assert store.lengths.tolist() == [6, 2]
    assert [segment.tolist() for segment in store.tree(0).segments] == [[0, 1], [2, 3, 4], [5]]
    assert [trained.tolist() for trained in store.tree(0).trained] == [[False] * 2, [True] * 3, [True]]
    assert [segment.tolist() for segment in store.tree(1).segments] == [[6, 7]]


def test_overlong_is_an_error_that_says_how_many_and_how_long(folder, tokenizer):
    longest = _prepare(_data("other.jsonl"), tokenizer, folder).train.lengths
    with pytest.raises(UserError) as error:
        _prepare(_data("other.jsonl", max_length=int(longest[6])), tokenizer, folder)
    (line,) = error.value.problems
    assert line.startswith(f"3 rows longer than data.max_length = {longest[6]} tokens, the longest {longest[9]}: ")
    assert f"other.jsonl:8 ({longest[7]})" in line
    assert "data.overlong=drop" in line


def test_overlong_rows_can_be_dropped(folder, tokenizer):
    limit = int(_prepare(_data("other.jsonl"), tokenizer, folder).train.lengths[6])
    made = _prepare(_data("other.jsonl", max_length=limit, overlong="drop"), tokenizer, folder)
    assert _places(made.train) == [f"other.jsonl:{i}" for i in range(1, 8)]
    assert [entry["line"] for entry in made.ledger.entries] == [8, 9, 10]


def test_overlong_rows_can_be_truncated(folder, tokenizer):
    whole = _prepare(_data("other.jsonl"), tokenizer, folder).train
    _save(folder / "long.jsonl", [_chat("a long question " * 30, "yes")])
    limit = int(whole.lengths[6])
    made = _prepare(_data("other.jsonl", "long.jsonl", max_length=limit, overlong="truncate"), tokenizer, folder)
    assert len(made.train) == 10
    for i in range(10):
        cut, full = made.train.tree(i), whole.tree(i)
        np.testing.assert_array_equal(cut.segments[0], full.segments[0][:limit])
        np.testing.assert_array_equal(cut.trained[0], full.trained[0][:limit])
        assert (made.train.lengths[i], made.train.labels[i]) == (len(cut.segments[0]), cut.trained[0].sum())
    actions = [(entry["file"], entry["line"], entry["action"]) for entry in made.ledger.entries]
    assert actions == [("other.jsonl", n, "truncated") for n in (8, 9, 10)] + [("long.jsonl", 1, "dropped")]
    assert f"no trained token in its first {limit} tokens" in made.ledger.entries[-1]["reason"]


def test_invalid_rows_are_errors_that_name_them(folder, tokenizer):
    _save(folder / "bad.jsonl", [_chat("q", "a"), *[_chat("q", "")] * 12])
    _save(folder / "long.jsonl", [_chat("q", "a" * 900)])
    with pytest.raises(UserError) as error:
        _prepare(_data("bad.jsonl", "long.jsonl", max_length=100), tokenizer, folder)
    *named, more, long = error.value.problems
    assert [line.split(": ")[0] for line in named] == [f"bad.jsonl:{i}" for i in range(2, 12)]
    assert more.startswith("… and 2 more; 12 rows cannot be taken")
    assert "data.invalid=drop" in more
    assert long.startswith("1 row longer than")


def test_rows_read_are_kept_or_in_the_ledger(folder, tokenizer):
    rows = [_chat(f"q{i}", "a" * (1 + 40 * (i % 3))) for i in range(30)]
    _save(folder / "mixed.jsonl", [*rows, *rows[:5], *[_chat("", "")] * 4])
    data = _data("mixed.jsonl", overlong="drop", invalid="drop", duplicates="drop", max_length=140)
    data = data.model_copy(update={"eval": data.eval.model_copy(update={"fraction": 0.3})})
    made = _prepare(data, tokenizer, folder)
    dropped = [f"{e['file']}:{e['line']}" for e in made.ledger.entries if e["action"] == "dropped"]
    everything = sorted(f"mixed.jsonl:{i + 1}" for i in range(39))
    assert sorted(dropped + _places(made.train) + _places(made.eval)) == everything
    assert made.ledger.dropped == {"invalid": 4, "overlong": 11, "duplicate": 4}
    made.ledger.write(folder / "ledger.jsonl")
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in lines] == sorted(entry["line"] for entry in made.ledger.entries)
    assert set(lines[0]) == {"file", "line", "action", "reason"}
    assert any("39 rows read" in line and "4 exact duplicates" in line for line in made.summary)


def test_duplicates_are_counted_and_kept_by_default(folder, tokenizer):
    _save(folder / "twice.jsonl", [_chat("q", "a"), _chat("r", "b"), _chat("q", "a")])
    shutil.copy(folder / "twice.jsonl", folder / "again.jsonl")
    made = _prepare(_data("twice.jsonl", "again.jsonl"), tokenizer, folder)
    assert len(made.train) == 6
    assert any("4 exact duplicates" in line for line in made.summary)
    made = _prepare(_data("twice.jsonl", "again.jsonl", duplicates="drop"), tokenizer, folder)
    assert _places(made.train) == ["twice.jsonl:1", "twice.jsonl:2"]
    assert made.ledger.count("dropped") == 4


def test_nothing_left_says_why(folder, tokenizer):
    with pytest.raises(UserError, match=r"data\.train: no row is left of 10 read; dropped: 10 overlong"):
        _prepare(_data("other.jsonl", max_length=3, overlong="drop"), tokenizer, folder)


def test_every_source_that_fails_is_named(folder, tokenizer):
    with pytest.raises(UserError) as error:
        _prepare(_data("none.jsonl", "chat.jsonl", "nor.jsonl"), tokenizer, folder)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["none.jsonl", "nor.jsonl"]


def test_counting_is_quiet_at_first_and_off_a_terminal_prints_lines(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    screen = io.StringIO()
    with counting(Console(file=screen, force_terminal=False)) as tell:
        for second, rows in ((1, 512), (11, 1024), (12, 1536), (22, 2048)):
            now = second
            tell("tokenising a[b].jsonl", rows)
    assert screen.getvalue() == "tokenising a[b].jsonl: 1,024 rows\ntokenising a[b].jsonl: 2,048 rows\n"


def test_long_texts_are_cut_into_chunks_that_train_each_token_once(folder, tokenizer):
    rows = [{"text": " ".join(f"w{i * j}" for i in range(n))} for j, n in enumerate((1, 60, 100, 5))]
    _save(folder / "texts.jsonl", [*rows, rows[1]])
    _save(folder / "talks.jsonl", [_chat("long " * 100, "yes"), _chat("short", "yes")])
    options = {"max_length": 96, "overlong": "chunk", "duplicates": "drop", "eval": {"fraction": 0.3}}
    data = _data("texts.jsonl", "talks.jsonl", **options)
    made = _prepare(data, tokenizer, folder)
    whole = {
        f"texts.jsonl:{i + 1}": render(row, tokenizer, "assistant").segments[0].tolist()
        for i, row in enumerate(read_rows(Source(path="texts.jsonl")))
    }
    taught, sides = {place: Counter() for place in whole}, {}
    for side in (made.train, made.eval):
        for i in range(len(side)):
            tree, (place, _, part) = side.tree(i), side.where(i).partition(", tokens ")
            assert len(tree.segments) == 1
            assert side.lengths[i] == side.longest[i] == len(tree.segments[0]) <= 96
            assert side.labels[i] == tree.trained[0].sum() > 0
            if place in whole:
                first = int(part.partition(" to ")[0]) - 1 if part else 0
                assert tree.segments[0].tolist() == whole[place][first : first + len(tree.segments[0])]
                assert bool(part) == (len(whole[place]) > 96)
                taught[place].update(first + np.flatnonzero(tree.trained[0]))
                assert sides.setdefault(place, side) is side, "chunks of one text stand on one side"
    for place, counts in taught.items():
        wanted = range(1, len(whole[place])) if not place.endswith(":5") else ()
        assert counts == Counter(wanted), "every token but the first, once; of a duplicate none"
    actions = [(e["file"], e["line"], e["action"]) for e in made.ledger.entries]
    assert sorted(actions) == [
        ("talks.jsonl", 1, "dropped"), ("texts.jsonl", 2, "chunked"), ("texts.jsonl", 3, "chunked"),
        ("texts.jsonl", 5, "dropped"),
    ]  # fmt: skip
    assert "0 truncated, 2 cut into chunks, 0 repaired" in "\n".join(made.summary)
    assert "examples of" in made.summary[-2]
    with pytest.raises(UserError, match="give it 2 or more"):
        _prepare(_data("texts.jsonl", max_length=1, overlong="chunk"), tokenizer, folder)


def test_what_is_to_be_said_of_a_file_is_said_once_also_from_the_cache(folder, tokenizer):
    rows = [_chat("q", f"a{i}") for i in range(3)]
    rows[1]["messages"][0]["mood"] = rows[2]["messages"][1]["mood"] = "glad"
    _save(folder / "rows.jsonl", rows)
    (folder / "more").mkdir()
    shutil.copy(folder / "other.jsonl", folder / "more")
    (folder / "more" / "gone.jsonl").symlink_to("nowhere.jsonl")
    for _ in range(2):
        made = _prepare(_data("rows.jsonl", "more"), tokenizer, folder)
        assert made.summary.count("rows.jsonl: nothing reads the key `mood` of a turn (2 rows)") == 1
        assert made.summary.count("more/gone.jsonl: this link leads to nowhere.jsonl, which is not there") == 1


def test_a_mapping_of_names_is_part_of_the_key(folder, tokenizer):
    rows = [{"messages": [{"role": "a", "content": "one"}, {"role": "b", "content": "two"}]}]
    _save(folder / "rows.jsonl", rows)
    texts = []
    for roles in ({"a": "user", "b": "assistant"}, {"a": "system", "b": "assistant"}):
        data = Data(train=[Source(path="rows.jsonl", roles=roles)])
        texts.append(tokenizer.decode(_prepare(data, tokenizer, folder).train.tree(0).segments[0]))
    assert ["user\none" in text for text in texts] == [True, False]
    assert ["system\none" in text for text in texts] == [False, True]


def test_a_ledger_of_files_whose_names_are_no_utf8(tmp_path):
    ledger = Ledger()
    ledger.lose("half\udcff\u2028.jsonl", 3, "invalid", "broken")
    ledger.write(tmp_path / "ledger.jsonl")
    (line,) = (tmp_path / "ledger.jsonl").read_bytes().splitlines()
    assert json.loads(line)["file"] == "half\udcff\u2028.jsonl"
