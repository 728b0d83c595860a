"""The HTTP server around the application: uvicorn, with an end for connections that say nothing."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from align.recipe.errors import UserError
from align.tools.serving.desk import Desk, done

SILENT = 30.0  # seconds after which a connection without a request is closed
BACKLOG = 2048  # connections that wait to be accepted
FILES = 65536  # connections and files that the process may have open, where the system lets it


class Protocol(H11Protocol):
    """A connection is closed when no request runs on it for SILENT seconds: one that never began, one that sends its
    head a byte a minute, one that was left open. Requests can cut their own off (`scope["state"]["abort"]`)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self.timeout_keep_alive = SILENT
        self.deadline = self.loop.call_later(SILENT, self._silent)

    def data_received(self, data: bytes) -> None:
        idle = self._idle()
        super().data_received(data)
        if idle and not self._idle():
            self.deadline.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.deadline.cancel()
        self.deadline = self.loop.call_later(SILENT, self._silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        super().connection_lost(exc)

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _silent(self) -> None:
        if self._idle():
            self.transport.abort()


class Listening(Server):
    """It ends when it is asked to: what runs is finished within `grace` seconds; asked again, it waits for nothing."""

    loop: asyncio.AbstractEventLoop | None = None  # while it runs

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They come to the main thread, which is another (`listen`)."""
        self.loop = asyncio.get_running_loop()
        yield

    def ask(self, *_signal: object) -> None:
        """From any thread, and as a signal's handler."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit and self.loop is not None:
            self.loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()


def listen(server: Listening, listener: socket.socket, desk: Desk) -> None:
    """Answer until a signal asks to end, in a thread of its own; the desk's work is done in this one."""
    served: Future[None] = Future()

    def run() -> None:
        done(partial(server.run, sockets=[listener]), served)
        desk.close()

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, server.ask) for number in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        threading.Thread(target=run, name="server", daemon=True).start()
        desk.work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    served.result()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    listener.listen(BACKLOG)
    return listener


def listening(app: ASGIApp, grace: float) -> Listening:
    """A server, to be given to `listen`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would have a line for each malformed request
    settings: dict[str, Any] = {"http": Protocol, "ws": "none", "lifespan": "off", "access_log": False}
    settings |= {"log_config": None, "server_header": False, "backlog": BACKLOG}
    return Listening(Config(app, timeout_graceful_shutdown=max(1, round(grace)), **settings))
