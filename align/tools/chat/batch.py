"""Answers to a file of prompts, drawn in one running batch: a row's place is another's as soon as it has ended.

An answer depends on the seed, the row's number and its prompt, not on the rows beside it. Rows are read while answers
are written, so memory does not grow with the file.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import get_peft_model_state_dict
from rich.console import Console
from rich.status import Status

from align.data.formats.formats import Found, find, read_records
from align.data.formats.prompts import PROMPTING, prompts
from align.data.formats.rows import Fault, Row
from align.models.checkpoints.adapters import token_without_row
from align.models.sampling.choice import Sampling
from align.models.sampling.decode import sample
from align.models.sampling.requests import Request
from align.recipe.errors import printable
from align.recipe.schema import Source
from align.tools.chat.answers import Answers
from align.tools.chat.speaker import Speaker
from align.tools.evaluation.folder import tokenizer_hash
from align.tools.pipeline.inputs import digest

CHUNK = 32  # rows that are read, and rendered, at once
AHEAD = 512  # rows that are under way at most
SETTINGS = {"max_new": "--max-new", "temperature": "--temperature", "top_p": "--top-p", "beams": "--beams"}
WRITE, TELL = 5.0, 30.0  # seconds between two writes, and between two lines where the screen is no terminal
OURS = {name for shape in PROMPTING.values() for name in (*shape.needs, *shape.may, *shape.either, *shape.also)}


class Asked:
    """A row of the file, and its answer when it is there."""

    def __init__(self, number: int, record: Any, row: Row | Fault) -> None:
        self.number, self.row = number, row
        self.others = {k: v for k, v in record.items() if k not in OURS} if isinstance(record, dict) else {}
        self.prompt: np.ndarray | None = None  # (l,) int32
        self.fault = row.reason if isinstance(row, Fault) else ""
        self.end, self.tokens = "", list[int]()

    @property
    def done(self) -> bool:
        return bool(self.fault or self.end)

    def line(self, speaker: Speaker) -> dict[str, Any]:
        """What is written of it: a conversation, or a text, with the answer at its end."""
        line: dict[str, Any] = {"file": self.row.file, "line": self.row.line}
        if self.fault:
            line |= {"error": self.fault}
        elif self.row.messages is not None:
            answer = speaker.said(self.prompt, self.tokens).strip()
            line |= {"messages": [*self.row.messages, {"role": "assistant", "content": answer}]}
            line |= {"tools": self.row.tools} if self.row.tools else {}
            line |= {"response": answer, "tokens": len(self.tokens), "end": self.end}
        else:
            answer = speaker.said(self.prompt, self.tokens)
            line |= {"text": self.row.text + answer, "response": answer, "tokens": len(self.tokens), "end": self.end}
        return line | ({"row": self.others} if self.others else {})


class Task(NamedTuple):
    """What is asked of every row."""

    source: Source
    sampling: Sampling
    seed: int
    system: str  # before conversations that have no such turn


def find_prompts(path: str) -> tuple[Source, list[Found]]:
    """The rows that a path stands for. Raises UserError for what holds no prompts."""
    source = Source(path=path)
    return source, find(source, PROMPTING)


def depends(speaker: Speaker, task: Task, found: Sequence[Found]) -> dict[str, Any]:
    """What answers depend on, by the word that a message calls it."""
    files = {each.file: digest(Path(each.file)) if Path(each.file).is_file() else "" for each in found}
    weights = sha256(speaker.trunk.fingerprint.encode())
    for name, weight in sorted(get_peft_model_state_dict(speaker.trunk.causal, save_embedding_layers=False).items()):
        weights.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "--prompts": files,
        "the model": weights.hexdigest()[:16],
        "its tokenizer": tokenizer_hash(speaker.tokenizer),
        **{SETTINGS.get(name, name): value for name, value in task.sampling._asdict().items()},
        "--seed": task.seed,
        "--system": task.system,
        "--dtype": str(speaker.trunk.dtype).removeprefix("torch."),
    }


def answer_file(speaker: Speaker, task: Task, answers: Answers) -> None:
    """Every row that `answers` does not have yet, in the order of the file."""
    rows = enumerate(read_records(task.source, PROMPTING))
    asked = (Asked(number, *row) for number, row in islice(rows, answers.done, None))
    chunks = (_prepared(speaker, task, chunk) for chunk in iter(lambda: list(islice(asked, CHUNK)), []))
    come = _drawn(speaker, task, chunks) if speaker.running else _searched(speaker, task, chunks)
    progress, waiting, written = Progress(answers.done), list[Asked](), time.monotonic()
    faults: list[str] = []
    with progress.status:
        for each in come:
            waiting.append(each)
            progress.more(each)
            if each.fault:
                faults.append(f"{each.row.file}:{each.row.line}: {each.fault}")
            if time.monotonic() - written > WRITE:
                answers.add([one.line(speaker) for one in waiting])
                waiting, written = [], time.monotonic()
        answers.add([one.line(speaker) for one in waiting])
    answers.finish()
    for fault in faults[:3]:
        print(printable(fault), file=sys.stderr)
    without = f"; {len(faults):,} have an error in the place of an answer" if faults else ""
    print(printable(f"done: {answers.path}: {answers.done:,} rows{without}{progress.speed}"), file=sys.stderr)


def _prepared(speaker: Speaker, task: Task, chunk: list[Asked]) -> list[Asked]:
    """With their prompts, or why they have none."""
    usable = [each for each in chunk if not each.fault]
    for each in usable:
        told = each.row.messages
        if task.system and told is not None and told[0]["role"] != "system":
            each.row = each.row._replace(messages=[{"role": "system", "content": task.system}, *told])
    trees = prompts().render([each.row for each in usable], speaker.tokenizer)
    for each, tree in zip(usable, trees, strict=True):
        if isinstance(tree, Fault):
            each.fault = tree.reason
            continue
        (each.prompt,) = tree.segments
        if fault := token_without_row(speaker.tokenizer, each.prompt, speaker.trunk.rows):
            each.fault = f"the prompt {fault}"
        elif speaker.room is not None and len(each.prompt) >= speaker.room:
            each.fault = f"the prompt has {len(each.prompt):,} tokens, and the model room for {speaker.room:,}"
    return chunk


def _how(speaker: Speaker, task: Task, each: Asked) -> Sampling:
    left = task.sampling.max_new if speaker.room is None else speaker.room - len(each.prompt)
    return task.sampling._replace(max_new=min(task.sampling.max_new, left))


def _end(task: Task, how: Sampling, ended: bool) -> str:
    return "ended" if ended else "max_new" if how.max_new == task.sampling.max_new else "context"


def _drawn(speaker: Speaker, task: Task, chunks: Iterator[Sequence[Asked]]) -> Iterator[Asked]:
    """Rows in their order, each when those before it have come too."""
    batch, under_way, rows = speaker.running, deque[Asked](), dict[Request, Asked]()
    more = True
    while more or under_way:
        while more and len(under_way) < AHEAD:
            chunk = next(chunks, None)
            more = chunk is not None
            for each in chunk or ():
                under_way.append(each)
                if not each.fault:
                    row = Request(speaker.voice, each.prompt, _how(speaker, task, each), (task.seed, each.number, 0))
                    rows[row] = each
                    batch.join(row)
        while under_way and under_way[0].done:
            yield under_way.popleft()
        if not batch.idle:
            for row, said in batch.step():
                each = rows[row]
                if said.end == "fault":
                    each.fault = said.fault
                else:
                    each.tokens.append(said.token)
                if said.end:
                    each.end = _end(task, row.sampling, said.end == "stop")
                    del rows[row]


def _searched(speaker: Speaker, task: Task, chunks: Iterator[Sequence[Asked]]) -> Iterator[Asked]:
    """The same by beams, a chunk at once."""
    for chunk in chunks:
        groups: dict[Sampling, list[Asked]] = {}
        for each in chunk:
            if not each.fault:
                groups.setdefault(_how(speaker, task, each), []).append(each)
        for how, group in groups.items():
            stems, keys = [each.prompt for each in group], [(task.seed, each.number) for each in group]
            for each, (response,) in zip(group, sample(speaker.trunk, stems, how, keys), strict=True):
                each.tokens, each.end = response.tokens.tolist(), _end(task, how, response.ended)
        yield from chunk


class Progress:
    """Rows and tokens so far, on stderr: a line that moves on a terminal, one every half a minute elsewhere."""

    def __init__(self, before: int) -> None:
        """`before`: rows that an earlier command has answered."""
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.rows, self.tokens, self.began = before, 0, time.monotonic()
        self.told = self.began
        if before:
            self.console.print(f"{before:,} rows are answered already; going on after them")
        self.status = Status("reading", console=self.console)

    @property
    def speed(self) -> str:
        """Of the tokens that were drawn, in words."""
        if not self.tokens:
            return ""
        return f", {self.tokens:,} tokens, {self.tokens / max(time.monotonic() - self.began, 1e-9):,.0f} a second"

    def more(self, each: Asked) -> None:
        """One more row."""
        self.rows, self.tokens = self.rows + 1, self.tokens + len(each.tokens)
        line = f"{self.rows:,} rows{self.speed}"
        if self.console.is_terminal:
            self.status.update(line)
        elif time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            self.console.print(line)
