"""A server that answers anything at all, over real connections: each fault is one line, in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread

import pytest
from models.tiny import VOCABULARY, tiny_tokenizer

from align.models.sampling.choice import Sampling
from align.recipe.engine import Server
from align.recipe.errors import UserError
from align.training.rollouts import client as asking
from align.training.rollouts.client import Client
from align.training.rollouts.completions import Ends
from align.training.rollouts.remote import Adapter, Remote

ENDS, ADAPTER = Ends(frozenset({2}), (), tiny_tokenizer(), VOCABULARY), Adapter(1, "/a", "salt")
Answering = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(answering: Answering) -> Iterator[str]:
    """Its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answering(self)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Nothing."""

    there = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.handle_error = lambda *_: None
    Thread(target=there.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{there.server_port}"
    finally:
        there.shutdown()
        there.server_close()


def said(status: int, body: bytes, **headers: str) -> Answering:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def dripping(handler: BaseHTTPRequestHandler) -> None:
    said(200, b"{", Content_Length="100000")(handler)
    for _ in range(500):
        handler.wfile.write(b" ")
        time.sleep(0.01)


def garbage(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff no HTTP\r\n\r\n")
    handler.close_connection = True


def broken_off(handler: BaseHTTPRequestHandler) -> None:
    said(200, b"{", Content_Length="100000")(handler)
    handler.close_connection = True


def forgetful(handler: BaseHTTPRequestHandler) -> None:
    """It loads everything, and has nothing."""
    said(404 if handler.path == "/v1/completions" else 200, b"<html>")(handler)


def remote_of(url: str, told: list[str], **more: object) -> Remote:
    section = Server(url=url, **({"patience": 0.2, "timeout": 60.0} | more))
    return Remote(Client(section, "engine", told.append), "actor", ENDS, lambda: None)


@pytest.mark.parametrize(
    ("answering", "wanted"),
    [
        (said(200, b"<html>It works!"), "names no model under /v1/models (status 200: <html>It works!)"),
        (said(404, b""), "names no model under /v1/models (status 404: without a word)"),
        (said(200, b'{"data": {"id": 3}}'), "names no model"),
        (said(200, b'{"data": [{"id": 3}, 7]}'), "names no model"),
        (said(500, b"<html>\x1b[2J"), "says 500 (<html>\\x1b[2J), and has answered nothing else for 0.2 seconds"),
        (said(503, b"", Retry_After="99999"), "says 503 (without a word), and has answered nothing else"),
        (said(307, b"", Location="http://elsewhere/"), "sends on to http://elsewhere/"),
        (said(401, b"no"), "refuses the API key (status 401: no)"),
        (said(200, b"no gzip", Content_Encoding="gzip"), "does not answer (Error -3"),
        (said(200, b" " * 5000), "answers /v1/models with more than"),
        (garbage, "does not answer ("),
        (broken_off, "does not answer ("),
    ],
)
def test_an_answer_that_is_none(monkeypatch, answering, wanted):
    monkeypatch.setattr(asking, "MOST_BYTES", 4000)
    with server(answering) as url:
        remote = remote_of(url, [])
        with pytest.raises(UserError) as fault:
            remote.run(remote.base())
    assert wanted in str(fault.value)
    assert str(fault.value).startswith(f"engine: {url} ")
    assert len(fault.value.problems) == 1


def test_an_answer_that_never_ends():
    """Each byte of it comes in time."""
    with server(dripping) as url:
        remote, started = remote_of(url, [], timeout=0.3), time.monotonic()
        with pytest.raises(UserError, match=r"gives no answer within 0\.3 seconds"):
            remote.run(remote.base())
    assert time.monotonic() - started < 4


def test_a_server_that_forgets_what_it_loads():
    """Many responses at once have it loaded once each time, and a bounded number of times."""
    loaded: list[str] = []

    def answering(handler: BaseHTTPRequestHandler) -> None:
        loaded.extend(["once"] * handler.path.endswith("load_lora_adapter"))
        forgetful(handler)

    with server(answering) as url:
        remote = remote_of(url, [])
        with pytest.raises(UserError, match="has lost the adapter actor 4 times over one response"):
            remote.run(remote.drawn(ADAPTER, Sampling(4), [([5, 6], None)] * 8, lambda: None))
    assert len(loaded) == 4


def test_a_trouble_that_passes_is_told_of_once():
    """Of eight requests, which are all refused at first: the last of them long after the first, and after others have
    had their answer."""
    told, asked, turn, answered, refused = [], [], Lock(), Event(), Event()
    good = b'{"choices": [{"finish_reason": "stop", "token_ids": [2], "logprobs": {"token_logprobs": [-0.5]}}]}'

    def answering(handler: BaseHTTPRequestHandler) -> None:
        with turn:
            asked.append(handler.path)
            count = len(asked)
        if count < 8:
            said(429, b"full", Retry_After="0")(handler)
        elif count == 8:
            answered.wait(20)  # one of the seven has its answer
            said(429, b"full", Retry_After="0")(handler)
            refused.set()
        else:
            if count > 9:
                refused.wait(20)
            said(200, good)(handler)
            answered.set()

    with server(answering) as url:
        remote = remote_of(url, told, patience=30.0)
        found = remote.run(remote.drawn(ADAPTER, Sampling(4), [([5, 6], None)] * 8, lambda: None))
    assert [response.tokens.tolist() for response in found] == [[2]] * 8
    assert len(told) == 1
    assert "says 429 (full); it is asked again for up to 30 seconds" in told[0]


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("http://no..host:8000", {}),
        (f"http://{'a' * 70}:8000", {}),
        ("http://127.0.0.1:9", {"http_proxy": "socks5://127.0.0.1:9"}),
        ("http://127.0.0.1:9", {"http_proxy": "nonsense://127.0.0.1:9"}),
    ],
)
def test_an_address_that_leads_nowhere(monkeypatch, url, environment):
    """It is a line, not a traceback of the HTTP client."""
    for name in ("http_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def ask() -> None:
        remote = remote_of(url, [], patience=0.0)
        remote.run(remote.base())

    with pytest.raises(UserError) as fault:
        ask()
    assert url in str(fault.value)
