"""Votes on two answers to one prompt: rows of a file that align.reward and align.dpo read.

`--votes votes.jsonl`: a vote for one side is appended to that file as a preference pair,

    {"prompt": [messages], "chosen": text, "rejected": text, "vote": "left", "models": …, "sampling": …, "time": …}

A tie prefers nothing, so it is no row to train on. It goes to `votes.ties.jsonl` beside it, with its two `answers`.
A line is on the disk when the page is told that the vote was kept; a vote that does not fit there leaves no part of it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from align.data.formats.answers import COMPARED
from align.data.formats.formats import convert
from align.data.formats.rows import Fault
from align.recipe.append import append, opened
from align.recipe.errors import UserError
from align.recipe.records import Record, read_lines
from align.tools.serving.limits import Limits, Refusal, body_of

INVALID = "invalid_request_error"
PAIR = {"prompt": list, "chosen": str, "rejected": str}  # what every line of the file has
SIDES = ("left", "right")
TIE = {"prompt": list, "answers": list}


class Shown(BaseModel):
    """An answer on the page."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str
    content: str
    sampling: dict[str, int | float | list[str]] = {}  # how it was drawn


class Vote(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(strict=True, extra="forbid")
    messages: list[dict[str, Any]]  # the conversation up to the answers
    answers: Annotated[list[Shown], Field(min_length=2, max_length=2)]  # left, right
    vote: Literal["left", "right", "tie"]


class Votes:
    """The two files, and how many lines each has."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that cannot be written, or that holds something else."""
        if path.suffix != ".jsonl":
            raise UserError(f"--votes: {path}: the file's name is to end in .jsonl")
        self.path, self.ties = path, path.with_suffix(".ties.jsonl")
        self.counts = {}
        os.close(opened(self.path, "--votes"))
        for name, file, shape in (("pairs", self.path, PAIR), ("ties", self.ties, TIE)):
            self.counts[name] = len(read_lines(file, shape, say=_torn))

    def add(self, vote: Vote) -> None:
        """Raises UserError where the vote is no row that a stage reads, or where there is no room for it."""
        texts = [answer.content for answer in vote.answers]
        chosen, rejected = reversed(texts) if vote.vote == "right" else texts
        row: Record = {"prompt": vote.messages, "chosen": chosen, "rejected": rejected}
        made = convert(row, "pairs", "the vote", 1, COMPARED)
        if isinstance(made, Fault):
            raise UserError(f"this vote is no preference pair: {made.reason}")
        if vote.vote == "tie":
            row = {"prompt": vote.messages, "answers": texts}
        row |= {
            "vote": vote.vote,
            "models": {side: answer.model for side, answer in zip(SIDES, vote.answers, strict=True)},
            "sampling": {side: answer.sampling for side, answer in zip(SIDES, vote.answers, strict=True)},
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append(self.ties if vote.vote == "tie" else self.path, [row], "--votes")
        self.counts["ties" if vote.vote == "tie" else "pairs"] += 1


def routes(votes: Votes | None, limits: Limits) -> list[Route]:
    """GET and POST /votes, for behind the server's door, which looks at key and origin."""

    async def tell(_request: Request) -> Response:
        return JSONResponse({"file": votes.path.name, **votes.counts} if votes else {"file": None})

    if votes is None:
        return [Route("/votes", tell)]

    async def take(request: Request) -> Response:
        try:
            await run_in_threadpool(votes.add, _read(request, await body_of(request, limits)))
        except Refusal as refusal:
            return refusal.reply()
        except UserError as error:
            full = isinstance(error.__cause__, OSError)
            return Refusal(507 if full else 400, error.problems[0], "server_error" if full else INVALID).reply()
        return await tell(request)

    return [Route("/votes", tell), Route("/votes", take, methods=["POST"])]


def _read(request: Request, body: bytes) -> Vote:
    """Raises Refusal. A form of another site cannot send this type, and a script of another site has to ask first."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "a vote is sent as application/json")
    try:
        return Vote.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refusal(400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from None


def _torn(line: str) -> None:
    raise UserError(f"--votes: {line.rpartition(';')[0]}; remove it")
