"""The server's application: OpenAI's paths, and a few of its own.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models
POST /score                 GET  /health           GET /metrics
POST /v1/load_lora_adapter  POST /v1/unload_lora_adapter   (with --adapters)
GET  /                      GET  /page/…           the page
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from align.models.sampling.running import Event
from align.recipe.errors import UserError
from align.tools.serving.answering import Answering, answers, full, model_of, prompts_of
from align.tools.serving.desk import Desk
from align.tools.serving.engine import Engine, tell
from align.tools.serving.limits import Door, Events, Limits, Refusal, body_of, unless_gone
from align.tools.serving.loading import Loading
from align.tools.serving.metrics import Metrics
from align.tools.serving.models import Served
from align.tools.serving.protocol import (
    ChatAsking,
    Faulty,
    LoadAsking,
    ScoreAsking,
    TextAsking,
    UnloadAsking,
    read,
)
from align.tools.serving.scoring import Reading, Scoring, scores, texts_of
from align.tools.serving.words import Prose

SHORT = 2**14  # letters whose tokens take no time to speak of: some 15 ms
Handler = Callable[[Request], Awaitable[Any]]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def build_app(
    engine: Engine,
    desk: Desk,
    limits: Limits | None = None,
    key: str | None = None,
    local: bool = True,
    adapters: Path | None = None,
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """`desk`: where prompts are written, which somebody works at; `key`: of the API; `local`: only names
    of this machine; `adapters`: a folder whose results may be loaded; `routes`: more paths behind the same door."""
    server = Server(engine, desk, limits or Limits(), adapters)
    own = [
        server.route("/v1/models", server.models),
        server.route("/v1/models/{name:path}", server.model),
        server.route("/v1/chat/completions", partial(server.answer, ChatAsking), "POST"),
        server.route("/v1/completions", partial(server.answer, TextAsking), "POST"),
        server.route("/score", server.score, "POST"),
        server.route("/v1/score", server.score, "POST"),
        server.route("/health", server.health),
        server.route("/metrics", server.metrics),
        server.route("/", server.page),
        server.route("/page/{name}", server.page),
    ]
    if adapters is not None:
        own += [
            server.route("/v1/load_lora_adapter", server.load, "POST"),
            server.route("/v1/unload_lora_adapter", server.unload, "POST"),
        ]
    return Starlette(
        routes=[*own, *routes],
        middleware=[Middleware(Door, key=key, local=local)],
        exception_handlers={HTTPException: _no_such_path},
    )


class Server:
    """What the paths do."""

    def __init__(self, engine: Engine, desk: Desk, limits: Limits, adapters: Path | None) -> None:
        self.engine, self.desk, self.limits, self.counts = engine, desk, limits, Metrics(engine)
        self.loading = None if adapters is None else Loading(engine, desk, adapters)
        self.loop: asyncio.AbstractEventLoop | None = None
        engine.deliver = self._deliver

    def _deliver(self, events: Sequence[Event]) -> None:
        """From the engine's thread into that of the replies."""
        with suppress(RuntimeError):  # the server has ended
            if events and self.loop is not None:
                self.loop.call_soon_threadsafe(tell, events)

    def route(self, path: str, handler: Handler, method: str = "GET") -> Route:
        """A path whose replies are counted, and which replies whatever happens."""

        async def guard(request: Request) -> Any:
            self.loop = asyncio.get_running_loop()
            try:
                reply = await handler(request)
            except Refusal as refusal:
                reply = refusal.reply()
            except Faulty as faulty:
                reply = Refusal(faulty.status, "\n".join(faulty.problems)).reply()
            except Exception:
                print(traceback.format_exc().rstrip(), file=sys.stderr)
                reply = Refusal(500, "internal error", "server_error").reply()
            self.counts.replies[path, getattr(reply, "status_code", 200)] += 1
            return reply

        return Route(path, guard, methods=[method])

    async def answer(self, kind: type[ChatAsking] | type[TextAsking], request: Request) -> Any:
        """Both kinds of completions."""
        began = time.monotonic()
        asked = read(await body_of(request, self.limits), kind)
        served = answers(self.engine, asked)
        prompts = await self.tokens(request, partial(prompts_of, served, asked))
        answering = Answering(self.engine, self.limits, asked, served, prompts)
        seconds = self.limits.seconds - (time.monotonic() - began)
        close = partial(self._closed, answering)
        if asked.stream:
            return Events(answering.pieces(), close, seconds)
        try:
            return _json(await unless_gone(request, answering.whole(), seconds))
        finally:
            close()

    def _closed(self, answering: Answering) -> None:
        answering.close()
        counts, reply = self.counts, answering.reply
        name = reply.about["model"]
        counts.read[name] += sum(map(len, reply.prompts))
        counts.reused += answering.reused
        for answer, asked in zip(reply.answers, answering.requests, strict=True):
            counts.said[name] += len(answer.pieces)
            counts.ends[name, answer.reason or "left"] += 1
            counts.time(asked, len(answer.pieces))

    async def tokens(self, request: Request, write: Callable[[], list[Prose]]) -> list[np.ndarray]:
        """The tokens of prompts that `write` gives, (l,) int32 each. Raises Refusal."""
        if self.desk.waiting >= self.limits.waiting:
            raise full()

        async def work() -> list[np.ndarray]:
            prose = await self.desk.do(write)
            long = sum(each.letters for each in prose) > SHORT
            return await self.desk.do(lambda: [each.tokens() for each in prose], long)

        try:
            return await unless_gone(request, work(), self.limits.seconds)
        except UserError as error:
            raise Refusal(400, str(error)) from None

    async def score(self, request: Request) -> Response:
        """Rewards and classes of texts."""
        asked = read(await body_of(request, self.limits), ScoreAsking)
        served = scores(self.engine, asked)
        texts = await self.tokens(request, partial(texts_of, served, asked))
        scoring = (Scoring if served.reader is None else Reading)(self.engine, served, texts)
        try:
            return _json(await unless_gone(request, scoring.whole(), self.limits.seconds))
        finally:
            scoring.close()

    async def models(self, _request: Request) -> Response:
        """All that can be asked, the base first."""
        return _json({"object": "list", "data": [*map(self._about, self.engine.models.values())]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return _json(self._about(model_of(self.engine, request.path_params["name"])))

    def _about(self, served: Served) -> dict[str, Any]:
        base = next((other.name for other in self.engine.models.values() if other.kind == "base"), None)
        about = {"id": served.name, "object": "model", "created": served.created, "owned_by": "align"}
        alone = served.kind == "base" or served.reader is not None
        more = {"root": served.source, "parent": None if alone else base, "kind": served.kind}
        room = self.engine.running.room if served.reader is None else served.reader.max_length
        return about | more | {"max_model_len": room}

    async def health(self, _request: Request) -> Response:
        """Whether requests are answered."""
        if not self.engine.alive:
            raise Refusal(503, "the engine has stopped", "server_error")
        return _json({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(self.counts.text(), media_type="text/plain; version=0.0.4")

    async def load(self, request: Request) -> Response:
        """An adapter more."""
        return PlainTextResponse(await self.loading.load(read(await body_of(request, self.limits), LoadAsking)))

    async def unload(self, request: Request) -> Response:
        """One less."""
        return PlainTextResponse(await self.loading.unload(read(await body_of(request, self.limits), UnloadAsking)))

    async def page(self, request: Request) -> Response:
        """The page's files, which lie in the package; a name with a folder in it is no path here."""
        name = request.path_params.get("name", "index.html")
        file = files("align.tools.serving") / "page" / name
        if Path(name).suffix not in KINDS or Path(name).name != name or not file.is_file():
            raise Refusal(404, "no such page", "not_found_error")
        return Response(file.read_bytes(), headers=HEADERS, media_type=KINDS[Path(name).suffix])


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body, allow_nan=False).encode(), media_type="application/json")


async def _no_such_path(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return Refusal(error.status_code, str(error.detail), kind).reply()
