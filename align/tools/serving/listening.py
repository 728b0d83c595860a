"""The HTTP server around the application: uvicorn, with an end for connections that say nothing."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from align.recipe.errors import UserError

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
    """Signals end it as a command ends: what runs is finished within `grace` seconds, and a second signal waits for
    nothing."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # signals come to the main thread alone
        for number in numbers:
            loop.add_signal_handler(number, self._asked)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _asked(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()


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
    """A server; its `run(sockets=[…])` ends when a signal asks, or `should_exit` is set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would have a line for each malformed request
    settings: dict[str, Any] = {"http": Protocol, "ws": "none", "lifespan": "off", "access_log": False}
    settings |= {"log_config": None, "server_header": False, "backlog": BACKLOG}
    return Listening(Config(app, timeout_graceful_shutdown=max(1, round(grace)), **settings))
