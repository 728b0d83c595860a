"""A file of prompts in, a file of answers out: every format, each answer as if alone, whole after any kill."""

from __future__ import annotations

import json
import resource
import signal

import pytest
from policies import make_policy
from test_chat import by_hand
from world import Child, align, talk, tree, write_rows

from align import chat, sft
from align.models.sampling.choice import Sampling

WARM = ("--temperature", 1.5, "--top-p", 0.9, "--max-new", 12, "--seed", 5, "--dtype", "float32")


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    return make_policy(world.base, tmp_path_factory.mktemp("policy"))


def lines(path) -> list[dict]:
    """What a model says may hold U+2028 and the like, at which str.splitlines would break a line."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def answered(model, file, *argv, status=0):
    told = align(model, "--prompts", file, "--output", "out.jsonl", *WARM, *argv, stage=chat)
    assert (told.status, told.out) == (status, ""), told
    return told.err


def test_rows_of_every_format(model, here):
    write_rows(here / "prompts.jsonl", [{"prompt": "Hi", "id": 7}, {"prompt": [{"role": "user", "content": "你好"}]}])
    talks = [talk("Hi", "No?"), talk("Say", "a", "b"), {"messages": []}, "torn {", talk("b" * 600, "c")]
    write_rows(here / "talks.jsonl", [{"messages": row["messages"]} if isinstance(row, dict) else row for row in talks])
    (here / "pairs.csv").write_text("prompt,chosen,rejected\nHi,Yes,No\n")
    (here / "text.txt").write_text("The capital of France\n\nSo\nit is\n")
    for name, count in (("prompts.jsonl", 2), ("talks.jsonl", 5), ("pairs.csv", 1), ("text.txt", 2)):
        told = answered(model, name)
        rows = lines(here / "out.jsonl")
        (here / "out.jsonl").rename(here / f"{name}.out")
        assert len(rows) == count
        assert f"done: out.jsonl: {count} rows" in told
        assert [row["line"] for row in rows] == sorted(row["line"] for row in rows)
    hello, chinese = lines(here / "prompts.jsonl.out")
    assert hello["row"] == {"id": 7}
    assert hello["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": hello["response"]}]
    assert hello["end"] in ("ended", "max_new")
    assert chinese["file"] == "prompts.jsonl"
    first, second, empty, torn, long = lines(here / "talks.jsonl.out")
    assert [turn["content"] for turn in first["messages"][:-1]] == ["Hi"], "the row's own answer is left out"
    assert [turn["content"] for turn in second["messages"][:-1]] == ["Say", "a", "And?"]
    assert "prompt" in empty["error"]
    assert "JSON" in torn["error"]
    assert "room for 512" in long["error"]
    assert "response" not in empty
    text = lines(here / "text.txt.out")[1]
    assert text["text"] == "So\nit is" + text["response"]
    assert not [path for path in here.iterdir() if "partial" in path.name]


def test_each_answer_is_as_if_alone(model, here):
    """Whatever stands beside it: the draws are those of the row's number."""
    asked = ["Name the capital of France", "b" * 300, "你好", "Hi"] * 4
    write_rows(here / "rows.jsonl", [{"prompt": text} for text in asked])
    answered(model, "rows.jsonl", "--system", "Be brief.")
    rows = lines(here / "out.jsonl")
    how = Sampling(12, temperature=1.5, top_p=0.9)
    (first,) = by_hand(model, asked[:1], how, 5, "Be brief.")  # key: the seed and the number 0
    assert rows[0]["response"] == first
    assert [row["messages"][0] for row in rows] == [{"role": "system", "content": "Be brief."}] * 16
    assert len({row["response"] for row in rows[::4]}) == 4, "a row that comes again is answered anew"
    write_rows(here / "few.jsonl", [{"prompt": text} for text in asked[:6]])
    (here / "out.jsonl").rename(here / "all.jsonl")
    answered(model, "few.jsonl", "--system", "Be brief.")
    assert [row["response"] for row in lines(here / "out.jsonl")] == [row["response"] for row in rows[:6]]


def test_beams(model, here):
    write_rows(here / "rows.jsonl", [{"prompt": "Hi"}, {}, {"prompt": "And?"}])
    argv = ("--beams", 2, "--max-new", 6, "--dtype", "float32")
    told = align(model, "--prompts", "rows.jsonl", "--output", "out.jsonl", *argv, stage=chat)
    assert told.status == 0, told.err
    first, error, last = lines(here / "out.jsonl")
    assert "error" in error
    for row, text in ((first, "Hi"), (last, "And?")):
        assert [row["response"]] == by_hand(model, [text], Sampling(6, temperature=0, beams=2), 0)


def test_what_comes_out_is_what_sft_reads(model, here, world):
    write_rows(here / "rows.jsonl", [{"prompt": f"Hi {n}", "chosen": "a", "rejected": "b"} for n in range(3)])
    answered(model, "rows.jsonl")
    told = align(world.recipe(here / "sft.yaml", data={"train": [{"path": "out.jsonl"}]}), "--show", stage=sft)
    assert (told.status, told.err) == (0, "")
    assert "out.jsonl: messages" in told.out


def test_it_goes_on_where_it_was_ended(model, here):
    """By a full disk, which leaves no part of a line; or by a kill, which may."""
    write_rows(here / "rows.jsonl", [{"prompt": f"Hi {n}"} for n in range(6)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        told = answered(model, "rows.jsonl", status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out.jsonl.partial: File too large; nothing was added to it: make room there" in told
    assert (here / "out.jsonl.partial").read_bytes() == b""
    about = (here / "out.jsonl.partial.json").read_bytes()
    answered(model, "rows.jsonl")
    whole = (here / "out.jsonl").read_bytes()
    assert [row["line"] for row in lines(here / "out.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert "out.jsonl is already there; name another" in answered(model, "rows.jsonl", status=2)
    assert (here / "out.jsonl").read_bytes() == whole

    (here / "out.jsonl").unlink()
    cut = whole.splitlines(keepends=True)
    (here / "out.jsonl.partial").write_bytes(b"".join(cut[:2]) + cut[2][:20])
    assert "without a whole out.jsonl.partial.json" in answered(model, "rows.jsonl", status=2)
    (here / "out.jsonl.partial.json").write_bytes(about)
    before = tree(here)
    for other, word in ((("--seed", 6), "--seed"), (("--max-new", 3), "--max-new")):
        assert f"holds answers that differ in {word};" in answered(model, "rows.jsonl", *other, status=2)
        assert tree(here) == before
    assert "2 rows are answered already" in answered(model, "rows.jsonl")
    assert (here / "out.jsonl").read_bytes() == whole
    assert {path.name for path in here.iterdir()} == {"rows.jsonl", "out.jsonl"}


@pytest.mark.slow
def test_after_a_kill_nothing_is_missing_and_nothing_twice(model, here):
    write_rows(here / "rows.jsonl", [{"prompt": f"Hi {n}"} for n in range(600)])
    words = (model, "--prompts", "rows.jsonl", "--output", "out.jsonl", *WARM, "--temperature", 0)
    for written in (0, 1):  # before the first rows are written, and after
        child = Child(here, *words, stage=chat)
        partial = here / "out.jsonl.partial"
        began = here / "out.jsonl.partial.json"

        def partial_grew(partial=partial) -> bool:
            return partial.is_file() and partial.stat().st_size > 0

        child.send_when(signal.SIGKILL, partial_grew if written else began.is_file)
        child.process.join()
    told = align(*words, stage=chat)
    assert told.status == 0, told.err
    assert [row["line"] for row in lines(here / "out.jsonl")] == [*range(1, 601)]
    assert all(row["response"] is not None for row in lines(here / "out.jsonl"))


@pytest.mark.slow
def test_two_commands_do_not_write_one_file(model, here):
    write_rows(here / "rows.jsonl", [{"prompt": f"Hi {n}"} for n in range(300)])
    words = (model, "--prompts", "rows.jsonl", "--output", "out.jsonl", *WARM, "--max-new", 100)
    child = Child(here, *words, stage=chat)
    assert child.send_when(signal.SIGCONT, (here / "out.jsonl.partial.json").is_file)
    told = align(*words, stage=chat)
    assert told.status == 2
    assert "another process writes out.jsonl.partial" in told.err
    assert child.wait().status == 0
    assert len(lines(here / "out.jsonl")) == 300


def test_what_a_user_can_mend(model, here, world):
    write_rows(here / "rows.jsonl", [{"prompt": "Hi"}])
    write_rows(here / "labels.jsonl", [{"a": 1}])
    before = tree(here)
    for argv, said in (
        (("--prompts", "rows.jsonl"), "--prompts and --output go together"),
        (("--output", "out.jsonl"), "--prompts and --output go together"),
        (("--prompts", "rows.jsonl", "--output", "out.txt"), "--output: out.txt: the file's name is to end in .jsonl"),
        (("--prompts", "rows.jsonl", "--output", "rows.jsonl"), "rows.jsonl is already there"),
        (("--prompts", "rows.jsonl", "--output", "no/out.jsonl"), "--output: no is no folder"),
        (("--prompts", "none.jsonl", "--output", "out.jsonl"), "none.jsonl"),
        (("--prompts", "labels.jsonl", "--output", "out.jsonl"), "no format fits its columns `a`"),
        (("--prompts", "rows.jsonl", "--output", "out.jsonl", "--compare", model), "leave --compare out"),
    ):
        told = align(model, *argv, stage=chat)
        assert (told.status, told.out) == (2, ""), argv
        assert said in told.err, (argv, told.err)
        assert tree(here) == before, argv
