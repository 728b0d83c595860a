"""What each stage was made of, and so whether it has to run: by content, never by date.

`<run>/stages/<name>.json` is written before a stage starts and again when it has finished; a kill between the two
leaves one that says where to go on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from align import __version__
from align.recipe.records import is_there, parsed, to_json
from align.tools.pipeline.inputs import digest, digests
from align.tools.pipeline.stage import Stage
from align.training.runs.durable import write_atomic
from align.training.runs.run import FREE

UNSEEN = FREE | {"workers": ..., "engine": ...}  # where `prepare` works: of a recipe, what decides on no result


class Content(TypedDict):
    """Of a stage, all that its result depends on."""

    version: str  # of align
    recipe: dict[str, Any]
    inputs: dict[str, str]  # path -> digest


class Record(NamedTuple):
    """A stage as it was last started."""

    folder: str  # as seen from the pipeline's
    made_of: Content
    result: str | None = None  # the digest of what it came to; None while it has not
    seconds: float = 0.0
    over: dict[str, int] = {}  # noqa: RUF012 (never changed) what a start over has to remove: path -> its ctime


RECORD = TypeAdapter(Record)


class Verdict(NamedTuple):
    """What to do with a stage, and why."""

    action: Literal["skip", "start", "resume", "start over"]
    why: str


class Records:
    """The records of one pipeline's stages."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "stages"

    def __getitem__(self, stage: Stage) -> Record | None:
        """What is known of a stage in the folder that it has now."""
        try:
            file = self._file(stage)
            record = RECORD.validate_python(parsed(file.read_bytes()) if is_there(file) else None)
        except (OSError, ValidationError):
            return None
        return record if record.folder == self._place(stage) else None

    def started(self, stage: Stage, over: bool) -> None:
        """Note that a stage is about to write into its folder, or to start over there."""
        there = _times(stage) if over else {}
        self._write(stage, Record(self._place(stage), made_of(stage), over=there))

    def finished(self, stage: Stage, seconds: float) -> None:
        """Note what it came to."""
        record = self[stage]
        assert record, stage.name
        self._write(stage, record._replace(result=digest(stage.result), seconds=seconds, over={}))

    def has_ended(self, stage: Stage) -> bool:
        """Whether the result of its last start is there, and not the one that this was to replace."""
        record = self[stage]
        assert record, stage.name
        return stage.mark.exists() and not {str(stage.mark): _time(stage.mark)}.items() <= record.over.items()

    def _write(self, stage: Stage, record: Record) -> None:
        write_atomic(self._file(stage), to_json(record._asdict(), indent=1))

    def _file(self, stage: Stage) -> Path:
        return self.folder / f"{stage.slug}.json"

    def _place(self, stage: Stage) -> str:
        return os.path.relpath(stage.folder, self.run)  # so that the whole may be moved

    def foreign(self, stage: Stage) -> str | None:
        """The problem with a folder that this pipeline did not fill."""
        folder = stage.folder
        if self[stage] or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return None
        return f"{stage.where}: {folder} holds what this pipeline did not make; name another `run`, or move it away"

    def verdict(self, stage: Stage, fresh: bool = False) -> Verdict:
        """What to do now, where all that the stage reads is there."""
        record = self[stage]
        if record is None:
            return Verdict("start", "not there yet")
        if fresh:
            return Verdict("start over", "--fresh")
        if changed := [*_changes(record.made_of, made_of(stage))]:
            return Verdict("start over", "; ".join(changed[:4]) + (f"; {len(changed) - 4} more" * (len(changed) > 4)))
        if record.over.items() & _times(stage).items():
            return Verdict("start over", "was about to")
        if record.result is None:
            return Verdict("resume", "was not finished")
        if not stage.mark.exists():
            return Verdict("resume", f"{stage.result} is gone")
        if record.result != digest(stage.result):
            return Verdict("start over", f"{stage.result} has been changed")
        return Verdict("skip", "finished and unchanged")


def _times(stage: Stage) -> dict[str, int]:
    """When what tells a run's settings and its end was written."""
    paths = (stage.folder / "recipe.yaml", stage.mark)
    return {str(path): _time(path) for path in paths if path.exists()}


def _time(path: Path) -> int:
    return path.stat().st_ctime_ns


def made_of(stage: Stage) -> Content:
    """All that the result depends on."""
    assert stage.recipe is not None
    recipe = json.loads(stage.recipe.model_dump_json(exclude=UNSEEN))
    return {"version": __version__, "recipe": recipe, "inputs": digests(stage.recipe)}


def _changes(there: Content, here: Content) -> Iterator[str]:
    if there["version"] != here["version"]:
        yield f"version {there['version']} of align, now {here['version']}"
    old, new = (dict(_flat(content["recipe"])) for content in (there, here))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here"
    for path in dict.fromkeys([*there["inputs"], *here["inputs"]]):
        if there["inputs"].get(path) != here["inputs"].get(path):
            yield f"{path} has changed"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(below, f"{name}.{key}".lstrip("."))
    else:
        yield name, value
