"""How reward functions are called: awaited, again, in time; and what becomes of responses without a score."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from align.data.formats.prompts import Asked
from align.recipe.errors import UserError
from align.training.borders.stops import Signals, Stopped
from align.training.rollouts.parts import Answered, RewardPart
from align.training.rollouts.rewards import Rewards

IMPORTS = "import asyncio, os, signal, sys, threading, time\n"


def answered(*responses: str) -> list[Answered]:
    return [Answered(Asked({"answer": i}, None, "q"), f"prompt {i}", text) for i, text in enumerate(responses)]


def rewards_of(*given: dict) -> Rewards:
    return Rewards([RewardPart(**part) for part in given], None)


def scores_of(rewards: Rewards, *responses: str) -> dict[str, list[float]]:
    found = rewards.of_texts(answered(*responses), 0, 1, Signals())
    return {title: scores.tolist() for title, scores in found.items()}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine` on Python's path, of these lines."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr("align.training.rollouts.functions.pause", lambda attempt: 0.01 * attempt)
    monkeypatch.setattr("align.training.rollouts.awaited.pause", lambda attempt: 0.01 * attempt)

    def write(text: str) -> None:
        (tmp_path / "mine.py").write_text(IMPORTS + text)

    return write


def test_async_functions_are_awaited_together(mine):
    """Each waits for the other; a loop that stays the same keeps clients usable; and one of them is a callable."""
    mine("""
met, loops = [], set()
async def meet(name, responses):
    met.append(name)
    loops.add(id(asyncio.get_running_loop()))
    while len(set(met)) < 2:
        await asyncio.sleep(0.001)
    return [len(r) for r in responses]
async def one(prompts, responses, rows):
    rows[0]["answer"] = "changed"
    return await meet("one", responses)
class Other:
    async def __call__(self, prompts, responses, rows):
        return [row["answer"] + await_ for row, await_ in zip(rows, await meet("other", responses))]
other = Other()
def plain(prompts, responses, rows):
    return [0.5] * len(rows)
""")
    given = [{"function": f"mine:{name}", "timeout": 60} for name in ("one", "other")]
    rewards = rewards_of(*given, {"function": "mine:plain"})
    for _ in range(2):
        assert scores_of(rewards, "a", "bb") == {"one": [1, 2], "other": [1, 3], "plain": [0.5, 0.5]}
    assert len(sys.modules["mine"].loops) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('answer')", "failed (KeyError: 'answer')"),
        ("sys.exit(3)", "failed (SystemExit: 3)"),
        ("os._exit(3)", "failed (Left: os._exit(3))"),
        ("raise asyncio.CancelledError", "failed (CancelledError)"),
        ("asyncio.get_running_loop().create_task(leaving()); await asyncio.sleep(0.05); return [1.0]", None),
        ("return [1.0, 2.0]", "gave more than 1 scores for 1 responses"),
        ("return [float('nan')]", "gave nan for the response 'x'"),
        ("return [None]", "gave no score for the response 'x'; on_failure: leave_out goes on without"),
        ("return 'x'", "failed (TypeError: it returned the text 'x'"),
        ("return [[1.0]]", "failed (TypeError: it returned the list [1.0] among its scores"),
        ("return [dict(score=1.0)]", "failed (TypeError: it returned the object {'score': 1.0} among its scores"),
        ("await asyncio.sleep(60)", "took longer than 0.2 s"),
        (
            "while True:\n        try: await asyncio.sleep(60)\n        except BaseException: pass",
            "took longer than 0.2 s",
        ),
    ],
)
def test_an_async_function_that_goes_wrong(mine, body, said):
    mine(f"async def leaving():\n    sys.exit(5)\nasync def score(prompts, responses, rows):\n    {body}\n")
    takes_long = said and said.startswith("took longer")
    rewards = rewards_of({"function": "mine:score", "timeout": 0.2 if takes_long else 20})  # a busy machine stalls
    started = time.monotonic()
    if said is None:
        assert scores_of(rewards, "x") == {"score": [1]}
    else:
        with pytest.raises(UserError) as error:
            scores_of(rewards, "x")
        (problem,) = error.value.problems
        assert problem.startswith(f"the reward function mine:score {said}")
    assert time.monotonic() - started < 5
    assert os.getpid()


def test_an_async_function_that_blocks_is_told_of(mine, monkeypatch):
    """It holds up the loop, so its time-out cannot end it; and the run is not held up."""
    monkeypatch.setattr("align.training.rollouts.awaited.BLOCKED", 0.1)
    mine("""
from threading import Event
go, ended = Event(), Event()
async def score(prompts, responses, rows):
    go.wait(60)
    ended.set()
    return [1.0]
""")
    for policy in ("stop", "leave_out"):
        with pytest.raises(UserError, match=r"mine:score failed \(RuntimeError: one blocks .* set `processes`\)"):
            scores_of(rewards_of({"function": "mine:score", "timeout": 0.1, "on_failure": policy}), "x")
    module = sys.modules["mine"]
    assert not module.ended.is_set()
    module.go.set()
    assert module.ended.wait(20)  # the loop is free again for other tests


def test_a_process_that_an_async_function_forks_is_not_the_run(mine):
    mine("""
async def score(prompts, responses, rows):
    global child
    child = os.fork()
    return [1.0]
""")
    assert scores_of(rewards_of({"function": "mine:score"}), "x") == {"score": [1]}
    deadline = time.monotonic() + 10
    while os.waitpid(sys.modules["mine"].child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.01)


def test_a_signal_ends_what_is_awaited(mine):
    mine("""
ended = []
async def score(prompts, responses, rows):
    asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
    try:
        await asyncio.sleep(60)
    finally:
        ended.append(True)
""")
    rewards = rewards_of({"function": "mine:score"})
    started = time.monotonic()
    with Signals() as signals, signals.deferred(), pytest.raises(Stopped):
        rewards.of_texts(answered("x"), 0, 1, signals)
    while not sys.modules["mine"].ended:
        assert time.monotonic() - started < 5
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_call_that_failed_is_made_again(mine, kind):
    """As often as `retries` says, with rows as they were."""
    mine(f"""
calls = []
{kind} score(prompts, responses, rows):
    calls.append([row.pop("answer") for row in rows])
    if len(calls) < 3:
        raise ConnectionError("busy")
    return [7.0] * len(rows)
""")
    with pytest.raises(UserError, match=r"mine:score failed \(ConnectionError: busy\)"):
        scores_of(rewards_of({"function": "mine:score", "retries": 1}), "a", "b")
    module = sys.modules["mine"]
    assert module.calls == [[0, 1]] * 2
    module.calls.clear()
    assert scores_of(rewards_of({"function": "mine:score", "retries": 2}), "a", "b") == {"score": [7, 7]}
    assert module.calls == [[0, 1]] * 3


def test_what_has_no_score_is_left_out(mine):
    """By hand: the part counts where it is known, a judge is no part of the sum, and reasons are kept."""
    mine("""
def odd(prompts, responses, rows):
    return [None if r == "none" else float("inf") if r == "inf" else len(r) for r in responses]
def judge(prompts, responses, rows):
    raise TimeoutError("judge")
def plain(prompts, responses, rows):
    return [1] * len(rows)
""")
    left = {"on_failure": "leave_out"}
    parts = (
        {"function": "mine:odd", "weight": 2.0, "mean": 1.0, "clip": 2.0} | left,
        {"function": "mine:judge", "weight": 0.0} | left,
        {"function": "mine:plain"},
    )
    rewards = rewards_of(*parts)
    found = rewards.of_texts(answered("a", "none", "inf", "long ones"), 0, 1, Signals())
    total = rewards.total(found)
    assert torch.equal(total.isnan(), torch.tensor([False, True, True, False]))
    assert total[[0, 3]].tolist() == [1.0, 2 * 2.0 + 1]
    assert rewards.failures(found) == {"failures/odd": 2, "failures/judge": 4}
    assert rewards.failed["odd"].startswith("gave inf for the response 'inf'")
    assert rewards.failed["judge"] == "failed (TimeoutError: judge)"
    rewards.check_known(~total.isnan())
    with pytest.raises(
        UserError, match=r"no response got a score: the reward function mine:odd gave inf .*; mine:judge"
    ):
        rewards.check_known(torch.zeros(4, dtype=torch.bool))
    strict = rewards_of(parts[0] | {"on_failure": "stop"}, *parts[1:])
    with pytest.raises(UserError, match="the reward odd gave a score that is not a number"):
        strict.total(found)


def test_a_time_that_nothing_keeps(mine):
    mine("def score(prompts, responses, rows):\n    return [1.0] * len(rows)\n")
    with pytest.raises(UserError, match=r"ppo\.rewards\.0\.timeout: mine:score is not async.*`processes: 1`"):
        rewards_of({"function": "mine:score", "timeout": 3})
