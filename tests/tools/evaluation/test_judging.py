"""The judge behind an endpoint, against a small server on this machine; and figures worked by hand."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from align.recipe.errors import UserError
from align.tools.evaluation.judging import LOST, Endpoint, EndpointJudge, Pair
from align.training.bootstrap import Draws
from align.training.borders.stops import Signals, Stopped

OVER = threading.Event()  # the test, for which a slow answer waits


@pytest.fixture
def server():
    """Answers by the words in A and B: see `verdict`; keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here.asked.append((self.path, dict(self.headers), asked))
            sides = asked["messages"][1]["content"].split("# Answer ")[1:]
            status, said = verdict(*(side[1:].strip() for side in sides))
            body = said if isinstance(said, bytes) else json.dumps(answer(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.asked, here.daemon_threads = [], True
    OVER.clear()
    threading.Thread(target=here.serve_forever, daemon=True).start()
    yield here
    OVER.set()
    here.shutdown()
    here.server_close()


def answer(said):
    return {"choices": [{"message": {"content": said}}]}


def verdict(a, b):
    """The longer one wins, unless a word in one of them asks for something else."""
    text = a + b
    if "slow" in text:
        OVER.wait(20)
    for word, found in (
        ("down", (503, "")),
        ("forbidden", (403, "")),
        ("biased", (200, "The first, so [[A]]")),
        ("half", (200, "[[C]]" if a.count("half") else "[[B]]")),
        ("chatty", (200, "I like both")),
        ("both", (200, "[[A]] or [[B]]")),
        ("torn", (200, b'{"choices": [')),
        ("empty", (200, b'{"choices": []}')),
    ):
        if word in text:
            return found
    return 200, "So: " + ("[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]")


def judge(server, **settings):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    given = {"retries": 0, "parallel": 1} | settings
    return EndpointJudge(Endpoint(url=url, model="tiny", **given), "judges.0.openai")


def pairs(*responses):
    return [Pair("why?", own, other) for own, other in responses]


def test_a_verdict_counts_if_it_is_the_same_with_the_sides_swapped(server):
    found = judge(server)(pairs(("because", "so"), ("so", "because"), ("yes", "why"), ("biased yes", "no")))
    assert found.margins.tolist()[:3] == [1, -1, 0]
    assert np.isnan(found.margins[3])
    assert found.excluded == {"contradiction": 1}
    (path, _, first), (_, _, second) = server.asked[:2]
    assert (path, first["model"], first["temperature"]) == ("/v1/chat/completions", "tiny", 0)
    assert "# Answer A\n\nbecause\n\n# Answer B\n\nso" in first["messages"][1]["content"]
    assert "# Answer A\n\nso\n\n# Answer B\n\nbecause" in second["messages"][1]["content"]
    assert len(server.asked) == 8


def test_whatever_is_no_verdict_is_excluded_and_counted_by_its_kind(server):
    words = ["half a loaf", "chatty", "both", "torn", "empty", "down", "forbidden"]
    found = judge(server)(pairs(*((word, "no") for word in words), ("yes", "no")))
    kinds = {"contradiction": 1, "nonsense": 4, "unreachable": 1, "refused": 1}
    assert found.excluded == Counter(kinds)
    assert np.isnan(found.margins[:-1]).all()
    assert found.margins[-1] == 1
    late = judge(server, timeout=0.2)(pairs(("slow", "no")))
    assert late.excluded == {"timeout": 1}


def test_win_rates_are_of_what_counts(server):
    found = judge(server)(pairs(("long", "no"), ("longer", "no"), ("no", "long"), ("biased", "no"), ("yes", "why")))
    own, other = np.array([4, 6, 2, 6, 3]), np.array([2, 2, 4, 2, 3])
    won, even = found.win_rate(own, other, Draws(300, 0))
    assert (won.value, won.n) == ((1 + 1 + 0 + 0.5) / 4, 4)
    assert won.low < won.value < won.high
    assert even.value == pytest.approx(0.5, abs=0.05)  # it went by length alone
    nothing = judge(server)(pairs(("biased", "no")))
    won, _ = nothing.win_rate(own[:1], other[:1], Draws(300, 0))
    assert np.isnan(won.value)
    assert won.n == 0


def test_what_did_not_get_through_is_tried_again_and_a_lost_judge_is_left(server):
    started = time.monotonic()
    assert judge(server, retries=1)(pairs(("down", "no"))).excluded == {"unreachable": 1}
    assert len(server.asked) == 2
    assert time.monotonic() - started > 0.4
    url = "http://127.0.0.1:9/v1"
    gone = EndpointJudge(Endpoint(url=url, model="m", retries=0, parallel=1), "k")
    found = gone(pairs(*[("yes", "no")] * (LOST + 3)))
    assert found.excluded == {"unreachable": LOST, "not_asked": 3}


def test_a_signal_waits_for_no_answer(server):
    started = time.monotonic()
    ask = judge(server, timeout=15.0, parallel=2)
    with Signals(), pytest.raises(Stopped):  # noqa: PT012
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
        ask(pairs(("slow", "no"), ("slow", "so")))
    assert time.monotonic() - started < 10


def test_the_key_is_sent_and_has_to_be_there(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    judge(server, api_key_env="SOME_KEY")(pairs(("because", "so")))
    assert server.asked[0][1]["Authorization"] == "Bearer s3cret"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UserError, match=r"judges\.0\.openai\.api_key_env: the environment variable SOME_KEY"):
        judge(server, api_key_env="SOME_KEY")
