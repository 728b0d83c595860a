"""Asking an inference server over HTTP: what may be otherwise later is asked again, for a bounded time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from align.recipe.engine import Server
from align.recipe.errors import UserError, reason
from align.recipe.records import parsed

T = TypeVar("T")
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others later
FIRST, LONGEST = 0.5, 30.0  # seconds between two tries: the first, and at most
CONNECTING = 10.0  # seconds
MOST_BYTES = 64 * 2**20  # of one answer
SHOWN = 300  # characters of what a server says


class Again(Exception):
    """What may be otherwise when it is asked again, in words; after so many seconds, if the server says so."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class Answer(NamedTuple):
    """What a server said: not to be asked again."""

    status: int
    raw: bytes
    after: float | None = None  # seconds until it wants to be asked again, where it says so

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object that it is; empty where it is none."""
        return parsed(self.raw) or {}

    @property
    def message(self) -> str:
        """Its fault in words."""
        told = self.json
        error = told.get("error", told)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        return str(message or self.raw.decode("utf-8", "replace"))[:SHOWN].strip() or "without a word"


class Patience:
    """When to ask again: soon at first, then ever later, until for `seconds` there were failures alone."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.since: float | None = None  # there have been failures alone

    def answered(self) -> None:
        """The server is there."""
        self.since = None

    def delay(self, tries: int, after: float | None = None) -> float | None:
        """After a failure, seconds to wait; None: no more. `tries`: of this request before, in vain; `after`: what the
        server says."""
        self.since = self.clock() if self.since is None else self.since
        left = self.seconds - (self.clock() - self.since)
        if left <= 0:
            return None
        wanted = FIRST * 2 ** min(tries, 20) if after is None else after
        return min(max(wanted, FIRST), LONGEST, left)


class Client:
    """A server, asked by one process. Within `open`, requests of one event loop share its connections."""

    def __init__(self, server: Server, key: str, say: Callable[[str], None]) -> None:
        """`key`: what it is called in the recipe. Raises UserError where httpx or its API key is missing, and for
        proxies that cannot be."""
        try:
            import httpx
        except ImportError:
            raise UserError(f"{key}: httpx is not installed; run: pip install 'align[rollouts]'") from None
        self.httpx, self.server, self.told, self.say = httpx, server, f"{key}: {server.url}", say
        self.patience = Patience(server.patience)
        self.headers: dict[str, str] = {}
        self._troubled = 0  # requests that are asked again now
        if name := server.api_key_env:
            secret = os.environ.get(name, "").strip()
            if not secret:
                raise UserError(f"{key}.api_key_env: the environment variable {name} is not set")
            if not secret.isascii() or not secret.isprintable():
                raise UserError(f"{key}.api_key_env: the key in {name} has characters that no HTTP header takes")
            self.headers["Authorization"] = f"Bearer {secret}"
        try:
            httpx.AsyncClient()
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise UserError(
                f"{self.told} cannot be asked ({reason(error)}); mend the proxies that the environment names "
                "(HTTP_PROXY, HTTPS_PROXY, ALL_PROXY), or name its host in NO_PROXY"
            ) from None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The connections, for a while."""
        timeout = self.httpx.Timeout(None, connect=CONNECTING)
        limits = self.httpx.Limits(max_connections=None, max_keepalive_connections=self.server.parallel)
        self._turns = asyncio.Semaphore(self.server.parallel)
        self.patience.answered()
        async with self.httpx.AsyncClient(timeout=timeout, limits=limits, headers=self.headers) as self._http:
            yield

    async def ask(
        self, path: str, body: dict[str, Any] | None, read: Callable[[Answer], T], tries: int | None = None
    ) -> T:
        """What `read` makes of the answer to a POST, or to a GET without a `body`; it may raise Again.

        `tries`: how often status 500 is taken for something that may pass. Raises UserError where the server gives no
        answer for `patience` seconds, or refuses its key.
        """
        failed = 0
        try:
            while True:
                try:
                    async with self._turns:
                        answer = await self.once(path, body)
                    if answer.status in AGAIN and not (answer.status == 500 and tries is not None and failed >= tries):
                        raise Again(f"says {answer.status} ({answer.message})", answer.after)
                    found = read(answer)
                except Again as fault:
                    delay = self.patience.delay(failed, fault.after)
                    if delay is None:
                        raise UserError(
                            f"{self.told} {fault}, and has answered nothing else for {self.server.patience:g} seconds; "
                            "look at the server's log, start it again, and run the same command again to go on"
                        ) from None
                    if not self._troubled:  # once for each trouble, however many requests are in it
                        self.say(f"{self.told} {fault}; it is asked again for up to {self.server.patience:g} seconds")
                    self._troubled += not failed
                    failed += 1
                    await asyncio.sleep(delay)
                else:
                    self.patience.answered()
                    return found
        finally:
            self._troubled -= bool(failed)

    async def once(self, path: str, body: dict[str, Any] | None) -> Answer:
        """One try. Raises Again where none comes, and UserError for one that is no use to anybody."""
        raw, method, url = bytearray(), "GET" if body is None else "POST", self.server.url + path
        try:
            async with asyncio.timeout(self.server.timeout), self._http.stream(method, url, json=body) as response:
                async for part in response.aiter_bytes():
                    raw += part
                    if len(raw) > MOST_BYTES:
                        raise UserError(f"{self.told} answers {path} with more than {MOST_BYTES >> 20} MiB")
        except TimeoutError:
            raise Again(f"gives no answer within {self.server.timeout:g} seconds") from None
        except (self.httpx.TransportError, self.httpx.DecodingError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise Again(f"does not answer ({why[0][:SHOWN]})") from None
        answer = Answer(response.status_code, bytes(raw), _seconds(response.headers.get("retry-after")))
        if answer.status in (401, 403):
            raise UserError(
                f"{self.told} refuses the API key (status {answer.status}: {answer.message}); name the environment "
                "variable that holds it in `api_key_env`"
            )
        if 300 <= answer.status < 400:
            where = response.headers.get("location", "nowhere")[:SHOWN]
            raise UserError(f"{self.told} sends on to {where}; give that address as `url`")
        return answer


def _seconds(after: str | None) -> float | None:
    """A Retry-After header, seconds or a date, in seconds from now; None for what is neither."""
    if after is None:
        return None
    try:
        return float(after) if after.strip().isdigit() else parsedate_to_datetime(after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
