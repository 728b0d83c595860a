"""What a request may cost and who may ask: key, host, size and time, before anything of it is looked at."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from align.tools.serving.replies import fault

OPEN = ("/", "/health")  # without a key; and the page's files
PAGE = "/page/"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
SAFE = ("GET", "HEAD")
DRAINED = 8  # times the largest body are read: a client that still sends would not see why it is refused


class Limits(NamedTuple):
    """Of one request; `waiting`: of all that have not begun."""

    body: int = 2**20  # bytes
    tokens: int = 4096  # of one answer
    seconds: float = 600.0  # from its head to its end
    reading: float = 30.0  # seconds for its body
    waiting: int = 1024


class Refusal(Exception):
    """A reply with an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.headers = status, message, kind, headers

    def reply(self) -> JSONResponse:
        """As OpenAI's clients read it."""
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return JSONResponse(fault(self.message, self.status, self.kind), self.status, headers or None)


class Door:
    """Around the whole application: host, origin and key of every request."""

    def __init__(self, app: ASGIApp, key: str | None, local: bool) -> None:
        """`local`: only this machine can ask, under its own names; a page from elsewhere cannot borrow one."""
        self.app, self.key, self.local = app, key and key.encode(), local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no websockets here
        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal.reply()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        if self.local and host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
            raise Refusal(403, "this server answers under the names of this machine alone; see --host")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise Refusal(403, "a page from another place may not ask this server")
        path = scope["path"]
        if self.key is None or path in OPEN or (path.startswith(PAGE) and scope["method"] in SAFE):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if not (scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.key)):
            raise Refusal(401, "a wrong API key, or none", "authentication_error", www_authenticate="Bearer")


async def body_of(request: Request, limits: Limits) -> bytes:
    """The body. Raises Refusal for one that is too large, or comes too slowly."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.reading):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body:
                    body += part
                elif size > DRAINED * limits.body:
                    break
    except ClientDisconnect:
        raise gone() from None
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {limits.reading:g} seconds") from None
    if size > limits.body:
        raise Refusal(413, f"the body has more than {limits.body:,} bytes")
    return bytes(body)


async def unless_gone(request: Request, work: Awaitable[Any], seconds: float) -> Any:
    """What the work gives. It ends early where the client leaves, and with a Refusal where its time is over."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(request.receive))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            raise gone()
        raise Refusal(504, f"no answer within {seconds:g} seconds", "timeout_error")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def gone() -> Refusal:
    """Nobody reads it any more; it is counted."""
    return Refusal(499, "the client has left")


async def left(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events:
    """A reply that comes in pieces. It ends early where the client leaves, does not read, or its time is over."""

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None], seconds: float) -> None:
        """`close()` is called when nothing more will be read of the pieces, however it came."""
        self.pieces, self.close, self.seconds = pieces, close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing, gone = asyncio.ensure_future(self._write(send)), asyncio.ensure_future(left(receive))
        try:
            done, _ = await asyncio.wait({writing, gone}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done and (abort := scope.get("state", {}).get("abort")):
                abort()  # what is still to be sent may never be read
            if writing in done:
                writing.result()
        finally:
            self.close()
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
