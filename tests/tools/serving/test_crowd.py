"""Many at once: 200 requests over three adapters, and clients that are slow, mute, hostile or gone."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from serving import ADAPTERS, serving

from align.tools.serving import listening
from align.tools.serving.limits import Limits

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from serve import ask, crowd  # the client whose figures are published

MOST = 24
pytestmark = pytest.mark.slow


def body(number: int, **options) -> dict:
    prompt = np.random.default_rng(number).integers(3, 250, 20).tolist()
    model = [*ADAPTERS][number % 3]
    return {"model": model, "prompt": prompt, "max_tokens": MOST, "temperature": 0, "ignore_eos": True} | options


def test_two_hundred_at_once_are_each_as_if_alone(shop):
    """None lost, none mixed up; first tokens fair, memory bounded, at least three times the speed of one at a time."""
    with serving([shop[name] for name in ADAPTERS]) as service:
        bodies = [body(i, **({"temperature": 1.2, "seed": i} if i % 2 else {})) for i in range(200)]
        asyncio.run(ask(service.url, bodies[0]))
        some = range(0, 200, 11)
        began = time.perf_counter()
        alone = {i: asyncio.run(ask(service.url, bodies[i])).tokens for i in some}
        slow = len(some) * MOST / (time.perf_counter() - began)
        began = time.perf_counter()
        heard = asyncio.run(crowd(service.url, bodies))
        fast = 200 * MOST / (time.perf_counter() - began)
        assert [len(each.tokens) for each in heard] == [MOST] * 200
        assert {i: heard[i].tokens for i in some} == alone
        assert len({tuple(each.tokens) for each in heard}) > 190
        first = sorted(each.first for each in heard)
        assert first[197] <= 3 * statistics.median(first)
        assert fast >= 3 * slow, (fast, slow)
        pools = service.engine.running.pools
        assert pools.held == 0, "what is held goes with the rows"


def test_each_of_two_hundred_equals_its_answer_alone(shop):
    """All of them, with rows that wait for memory and for a place."""
    with serving([shop[name] for name in ADAPTERS], rows=48, tokens=4096) as service:
        bodies = [body(i, max_tokens=8 + i % 24, temperature=i % 3 / 2, seed=i) for i in range(200)]
        with ThreadPoolExecutor(1) as pool:
            alone = [*pool.map(lambda one: asyncio.run(ask(service.url, one)).tokens, bodies)]
        together = [each.tokens for each in asyncio.run(crowd(service.url, bodies))]
        assert together == alone
        memory = psutil.Process().memory_info().rss
        assert [each.tokens for each in asyncio.run(crowd(service.url, bodies))] == alone
        assert psutil.Process().memory_info().rss - memory < 50e6


def connected(service, count: int) -> list[socket.socket]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    return [socket.create_connection(("127.0.0.1", service.port)) for _ in range(count)]


def files() -> int:
    return psutil.Process().num_fds()


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.01)


def test_a_thousand_connections_that_say_nothing_harm_nobody(shop, monkeypatch):
    """And those that send half a head, or a byte now and then, are closed in their time."""
    monkeypatch.setattr(listening, "SILENT", 1.5)
    with serving([shop["red"]]) as service:
        alone = asyncio.run(ask(service.url, body(0)))
        before = files()
        lines = connected(service, 1000)
        for line in lines[::4]:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-")
        heard = asyncio.run(crowd(service.url, [body(0)] * 8))
        assert [each.tokens for each in heard] == [alone.tokens] * 8

        def drip() -> bool:
            closed = 0
            for line in lines:
                line.setblocking(False)
                try:
                    line.send(b"a") if line in lines[:4] else None
                    closed += line.recv(1) == b""
                except BlockingIOError:
                    pass
                except OSError:
                    closed += 1
            return closed == len(lines)

        until(drip, 10)
        for line in lines:
            line.close()
        until(lambda: files() <= before + 4)
        assert asyncio.run(ask(service.url, body(0))).tokens == alone.tokens


def test_a_reader_that_does_not_read_is_cut_off_and_holds_nobody_up(shop):
    """A stream larger than what the system's buffers take."""
    with serving([shop["red"]], limits=Limits(seconds=2.0)) as service:
        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        line.connect(("127.0.0.1", service.port))
        data = json.dumps(body(0, max_tokens=200, n=64, logprobs=20, stream=True)).encode()
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        until(lambda: service.engine.busy > 0)
        assert len(asyncio.run(ask(service.url, body(0))).tokens) == MOST
        until(lambda: service.engine.busy == 0)
        line.settimeout(10)
        told = b"".join(iter(lambda: line.recv(65536), b""))
        assert told.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in told


def test_a_body_that_comes_too_slowly_is_refused(shop):
    with serving([shop["red"]], limits=Limits(reading=0.3)) as service:
        (line,) = connected(service, 1)
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        line.settimeout(10)
        assert b" 408 " in line.recv(100)


def test_what_is_no_http_is_refused(shop):
    with serving([shop["red"]]) as service:
        for words in (
            b"\0\xff" * 100 + b"\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET " + b"a" * 100_000,
            b"\r\n" * 5000,
        ):
            (line,) = connected(service, 1)
            line.sendall(words)
            line.shutdown(socket.SHUT_WR)
            line.settimeout(5)
            told = line.recv(1000)
            assert told == b"" or told.startswith(b"HTTP/1.1 4")
            line.close()
        assert len(asyncio.run(ask(service.url, body(0))).tokens) == MOST
