"""Reward functions in processes of their own: one response a call, killed when late, and none outlives its run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from test_functions import answered, scores_of
from world import alive

from align.recipe.errors import UserError
from align.training.borders.stops import Signals, Stopped
from align.training.rollouts.parts import RewardPart
from align.training.rollouts.pool import Pool
from align.training.rollouts.rewards import Rewards

MODULE = """
import asyncio, os, signal, subprocess, sys, time

def length(prompts, responses, rows):
    (prompt,), (response,), (row,) = prompts, responses, rows
    assert prompt == f"prompt {row['answer']}"
    return [len(response)]

def rendezvous(prompts, responses, rows):
    open(f"{rows[0]['answer']}.here", "w")
    while len([name for name in os.listdir() if name.endswith(".here")]) < 2:
        time.sleep(0.005)
    return [os.getpid()]

async def awaited(prompts, responses, rows):
    await asyncio.sleep(0)
    return [2.0]

def light(prompts, responses, rows):
    return [float("torch" in sys.modules)]

def wild(prompts, responses, rows):
    match responses[0]:
        case "exit": sys.exit(3)
        case "_exit": os._exit(3)
        case "kill": os.kill(os.getpid(), signal.SIGKILL)
        case "group": os.killpg(0, signal.SIGKILL)
        case "none": return [None]
        case "nan": return [float("nan")]
        case "two": return [1.0, 2.0]
        case "text": return "1"
        case "raise": raise ValueError("\\x1b[1mbold\\x1b[0m")
        case "close": os.closerange(3, 100)
        case "print": print("said" * 50_000)
        case "stdout": sys.stdout.close()
        case "long": time.sleep(60)
        case "fail once" if not os.path.exists("failed"):
            open("failed", "w")
            raise ConnectionError("busy")
    return [1.0]

def stubborn(prompts, responses, rows):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("pids", "a").write(f"{os.getpid()} {child.pid}\\n")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    9 ** 9 ** 9  # holds Python's lock for hours

def telling(prompts, responses, rows):
    signal.raise_signal(signal.SIGTERM)
"""
AGAIN = "import os\nif os.path.exists('once'):\n    {}\nopen('once', 'w')\ndef score(*_):\n    return [1.0]\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, with a module `verifier` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "verifier", raising=False)
    monkeypatch.setattr("align.training.rollouts.pool.pause", lambda attempt: 0.01 * attempt)
    (tmp_path / "verifier.py").write_text(MODULE)
    return tmp_path


def rewards_of(*names: str, **how) -> Rewards:
    return Rewards([RewardPart(function=f"verifier:{name}", **how) for name in names], None)


def pids(here: Path) -> list[int]:
    file = here / "pids"
    return [int(word) for word in file.read_text().split()] if file.is_file() else []


def soon(true) -> bool:
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_each_response_is_a_call_and_calls_run_side_by_side(here):
    assert scores_of(rewards_of("length", processes=2), "a", "bb", "", "dddd") == {"length": [1, 2, 0, 4]}
    one, other = scores_of(rewards_of("rendezvous", processes=2), "a", "b")["rendezvous"]
    assert len({one, other, float(os.getpid())}) == 3
    assert scores_of(rewards_of("awaited", "light", processes=1), "a", "b") == {"awaited": [2, 2], "light": [0, 0]}


def test_whatever_it_does_only_its_own_response_is_without_a_score(here):
    """And the reason is said; what closes its connection is late, for all that is heard of it."""
    odd = {
        "exit": "failed (SystemExit: 3)",
        "_exit": "failed (the process ended with exit status 3)",
        "kill": "failed (the process ended by SIGKILL)",
        "group": "failed (the process ended)",
        "none": "gave no score",
        "nan": "gave nan",
        "two": "gave more than 1 scores for 1 responses",
        "text": "failed (TypeError: it returned the text '1'",
        "raise": "failed (ValueError: \x1b[1mbold",
        "close": "failed (the process ended with exit status 0)",
        "long": "took longer than 1 s",
    }
    pool = Pool("verifier:wild", 2, 1.0, 0)
    calls = [("p", response, {}) for response in (*odd, "print", "stdout", "x")]
    said = pool(calls)
    assert said[len(odd) :] == [1.0, 1.0, 1.0]
    for found, (response, expected) in zip(said, odd.items(), strict=False):
        assert isinstance(found, str), response
        assert found.startswith(expected), (response, found)
    assert pool([("p", "x", {})] * 3) == [1.0] * 3


def test_what_failed_is_tried_again_and_late_calls_too(here):
    assert scores_of(rewards_of("wild", processes=2, retries=1), "fail once", "x") == {"wild": [1, 1]}
    started = time.monotonic()
    with pytest.raises(UserError, match=r"verifier:wild took longer than 0.3 s"):
        scores_of(rewards_of("wild", processes=1, retries=1, timeout=0.3), "long")
    assert 0.6 < time.monotonic() - started < 10


def test_the_end_of_a_late_process_is_that_of_all_it_started(here):
    """Even where it holds Python's lock and ignores signals."""
    with pytest.raises(UserError, match="took longer"):
        scores_of(rewards_of("stubborn", processes=1, timeout=1), "x")
    assert len(pids(here)) == 2
    assert soon(lambda: not alive(*pids(here)))


def test_a_signal_ends_calls_at_once_and_the_pool_stays_usable(here):
    rewards = rewards_of("wild", processes=2)
    started = time.monotonic()
    Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with Signals() as signals, signals.deferred(), pytest.raises(Stopped):
        rewards.of_texts(answered("long", "x"), 0, 1, signals)
    assert time.monotonic() - started < 10
    assert scores_of(rewards, "x") == {"wild": [1]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise OSError('none left')", "OSError: none left"),
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("os._exit(4)", "the process ended with exit status 4"),
    ],
)
def test_what_can_be_imported_in_the_run_alone(here, monkeypatch, line, said):
    """Whatever the policy: nothing would ever have a score."""
    (here / "again.py").write_text(AGAIN.format(line))
    monkeypatch.delitem(sys.modules, "again", raising=False)
    rewards = Rewards([RewardPart(function="again:score", processes=1, on_failure="leave_out", retries=3)], None)
    with pytest.raises(UserError) as error:
        scores_of(rewards, "x")
    assert error.value.problems == (
        f"the reward function again:score cannot be imported in a process of its own ({said})",
    )


def test_no_process_outlives_its_pool(here):
    rewards = rewards_of("rendezvous", processes=2)
    numbers = [int(number) for number in scores_of(rewards, "a", "b")["rendezvous"]]
    assert alive(*numbers)
    del rewards
    assert soon(lambda: not alive(*numbers))
