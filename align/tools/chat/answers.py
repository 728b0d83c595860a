"""A file of answers: one line of JSON for each row of a file of prompts, in its order.

While it is written, its lines stand in `OUT.partial`, and what they depend on in `OUT.partial.json`. The same command
goes on from there, whenever it was ended; OUT itself is whole or absent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.recipe.append import extend, opened
from align.recipe.errors import UserError
from align.recipe.locks import locked
from align.recipe.paths import expanded
from align.recipe.records import parsed, to_json
from align.training.runs.durable import sync, write_atomic


class Answers:
    """The file of answers, and how many of them are there."""

    def __init__(self, name: str) -> None:
        """Raises UserError for a path that is not free."""
        self.path = Path(expanded(name))
        if self.path.suffix != ".jsonl":
            raise UserError(f"--output: {self.path}: the file's name is to end in .jsonl")
        if os.path.lexists(self.path):
            raise UserError(f"--output: {self.path} is already there; name another file, or move it away")
        if not self.path.parent.is_dir():
            raise UserError(f"--output: {self.path.parent} is no folder; make it, or name another")
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.about = self.path.with_name(f"{self.path.name}.partial.json")
        self.done = 0

    @contextmanager
    def open(self, depends: dict[str, Any]) -> Iterator[None]:
        """Hold the file against other processes. `done` lines are there from an earlier command whose answers depend on
        the same; UserError where they depend on something else."""
        self.handle = opened(self.partial, "--output")
        try:
            with locked(self.handle, wait=False):
                self._check(depends)
                self.done = self._whole()
                yield
        except BlockingIOError:
            raise UserError(f"--output: another process writes {self.partial}; wait for it, or stop it") from None
        finally:
            os.close(self.handle)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """More lines; on the disk when this returns."""
        extend(self.handle, self.partial, records)
        self.done += len(records)

    def finish(self) -> None:
        """All lines are there."""
        if os.path.lexists(self.path):
            raise UserError(f"--output: {self.path} has come meanwhile; the answers stand in {self.partial}")
        self.partial.rename(self.path)
        self.about.unlink()
        sync(self.path.parent)

    def _check(self, depends: dict[str, Any]) -> None:
        now = to_json(depends, indent=1)
        if not self.partial.stat().st_size:
            write_atomic(self.about, now)
            return
        before, now = parsed(self.about.read_bytes()) if self.about.is_file() else None, parsed(now)
        if before is None:
            raise UserError(f"--output: {self.partial} is there without a whole {self.about.name}; move it away")
        if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            raise UserError(
                f"--output: {self.partial} holds answers that differ in {', '.join(changed)}; name another file, or "
                "remove it"
            )

    def _whole(self) -> int:
        """How many lines are whole; one that a kill has torn goes."""
        with self.partial.open("rb") as file:
            lines = size = 0
            for line in file:
                if line.endswith(b"\n"):
                    lines, size = lines + 1, size + len(line)
        os.ftruncate(self.handle, size)
        return lines
