"""Votes of the page as rows that stages read: whole or not there, from this server's own page alone."""

from __future__ import annotations

import json
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from world import align, lines, write_rows

from align import dpo, reward
from align.recipe.errors import UserError
from align.tools.serving.limits import Door, Limits
from align.tools.serving.votes import Votes, routes

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好?"}]
HOST = "http://127.0.0.1:8000"


def ballot(vote: str = "left", *texts: str, **more) -> dict:
    shown = zip("ab", texts or ("Yes.", "No"), (1, 2), strict=True)
    answers = [{"model": name, "content": text, "sampling": {"seed": seed}} for name, text, seed in shown]
    return {"messages": ASKED, "answers": answers, "vote": vote} | more


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "votes.jsonl"


@pytest.fixture
def client(file) -> TestClient:
    return behind_the_door(Votes(file))


def behind_the_door(votes: Votes | None) -> TestClient:
    return TestClient(Door(Starlette(routes=routes(votes, Limits(body=100_000))), None, local=True), HOST)


def test_a_vote_is_a_pair_and_a_tie_is_none(client, file):
    assert client.get("/votes").json() == {"file": "votes.jsonl", "pairs": 0, "ties": 0}
    for vote in ("left", "right", "tie"):
        told = client.post("/votes", json=ballot(vote))
    assert (told.status_code, told.json()) == (200, {"file": "votes.jsonl", "pairs": 2, "ties": 1})
    first, second = lines(file)
    assert (first["prompt"], first["chosen"], first["rejected"]) == (ASKED, "Yes.", "No")
    assert (second["chosen"], second["rejected"], second["vote"]) == ("No", "Yes.", "right")
    assert second["models"] == {"left": "a", "right": "b"}
    assert second["sampling"] == {"left": {"seed": 1}, "right": {"seed": 2}}
    (tie,) = lines(file.with_name("votes.ties.jsonl"))
    assert tie["answers"] == ["Yes.", "No"]
    assert "chosen" not in tie
    again = behind_the_door(Votes(file))
    assert again.get("/votes").json() == told.json(), "counted from the files"


def test_a_server_without_votes(file):
    client = behind_the_door(None)
    assert client.get("/votes").json() == {"file": None}
    assert client.post("/votes", json=ballot()).status_code == 405


@pytest.mark.parametrize("stage", [reward, dpo])
def test_stages_read_the_votes(client, file, world, here, stage):
    for city in ("Rome", "Lima", "Cairo"):
        talk = [*ASKED, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": city}]
        assert client.post("/votes", json=ballot("right", "No", f"It is {city}.", messages=talk)).status_code == 200
    assert client.post("/votes", json=ballot("tie")).status_code == 200
    recipe = world.preferences(here / "r.yaml", stage, data={"train": [{"path": str(file)}]})
    told = align(recipe, "--show", stage=stage)
    assert (told.status, told.err) == (0, "")
    assert "votes.jsonl: pairs" in told.out
    assert "It is Rome." in told.out


def test_votes_at_once_stay_whole(client, file):
    long = "x" * 20_000
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda i: client.post("/votes", json=ballot("left", f"{i} {long}", long)), range(40)))
    assert {each.status_code for each in told} == {200}
    assert sorted(int(row["chosen"].split()[0]) for row in lines(file)) == list(range(40))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": HOST, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8001"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
)
def test_votes_come_from_the_own_page(client, file, headers, status):
    sent = {"Content-Type": "application/json"} | headers
    told = client.post("/votes", content=json.dumps(ballot()), headers=sent)
    assert told.status_code == status
    assert len(lines(file)) == (status == 200)
    assert status == 200 or told.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON"),
        (b"[]", "the body"),
        (b"\xff", "JSON"),
        (b"[" * 10_000, "JSON"),
        (ballot(vote="both"), "vote"),
        (ballot(more=1), "more"),
        (ballot(messages=[]), "prompt"),
        (ballot("tie", messages=[]), "prompt"),
        (ballot("tie", "a", ""), "rejected"),
        (json.dumps(ballot()).replace('"seed": 1', '"t": 1e999').encode(), "sampling.t"),
        (ballot(messages=["Hi"]), "messages.0"),
        (ballot(messages=[{"role": "user"}]), "content"),
        (ballot(messages=[*ASKED, {"role": "assistant", "content": "a"}]), "found assistant"),
        (ballot("left", "same", " same "), "the same"),
        (ballot("right", "", "a"), "rejected"),
        (ballot(answers=[{"model": "a", "content": "b"}]), "answers"),
        (ballot(answers=[{"model": "a", "content": 1}] * 2), "answers.0.content"),
        (json.dumps(ballot("left", "\ud800", "a")).encode(), ""),
    ],
)
def test_what_is_no_vote_leaves_no_trace(client, file, body, said):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = client.post("/votes", content=content, headers={"Content-Type": "application/json"})
    assert told.status_code == 400, told.text
    assert said in told.json()["error"]["message"], told.text
    assert file.read_bytes() == b""
    assert not file.with_suffix(".ties.jsonl").exists()


def test_a_vote_has_a_largest_size(client, file):
    assert client.post("/votes", json=ballot("left", "a" * 100_000, "b")).status_code == 413
    assert file.read_bytes() == b""


def test_a_full_disk_is_told_and_nothing_is_torn(client, file):
    assert client.post("/votes", json=ballot()).status_code == 200
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
    try:
        told = client.post("/votes", json=ballot())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.status_code == 507
    assert "nothing was added" in told.json()["error"]["message"]
    assert file.read_bytes() == before
    assert client.post("/votes", json=ballot()).json()["pairs"] == 2


def test_a_file_that_a_person_has_edited(file):
    write_rows(file, [{"prompt": ASKED, "chosen": "a", "rejected": "b"}])
    file.write_bytes(file.read_bytes().rstrip())
    client = behind_the_door(Votes(file))
    assert client.post("/votes", json=ballot()).json()["pairs"] == 2
    assert [row["chosen"] for row in lines(file)] == ["a", "Yes."]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("votes.txt", None, "end in .jsonl"),
        ("no/votes.jsonl", None, "No such file or directory; name another"),
        ("rows.jsonl", '{"messages": []}\n', "rows.jsonl:1: it has no 'prompt' of type list"),
        (
            "rows.jsonl",
            '{"prompt": [], "chosen": "a", "rejected": "b"}\n{"prompt',
            "rows.jsonl:2: the last line is torn",
        ),
        ("rows.jsonl", "nonsense\n\n{}\n", "rows.jsonl:1: not a JSON object"),
    ],
)
def test_files_that_take_no_votes(tmp_path, name, content, said):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said):
        Votes(file)
    assert content is None or file.read_text() == content


def test_a_folder_takes_no_votes(tmp_path):
    (tmp_path / "votes.jsonl").mkdir()
    with pytest.raises(UserError, match="is no file"):
        Votes(tmp_path / "votes.jsonl")
