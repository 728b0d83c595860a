"""A run's folder: whose it is, what is in it, and never writing over another run's."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.recipe.errors import UserError
from align.recipe.load import dump_recipe, load_recipe
from align.recipe.schema import BaseRecipe
from align.training.checkpoint import newest_checkpoint, write_atomic
from align.training.meters import environment

OWN = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "ledger.jsonl", "data.json", "samples.jsonl",
    "episodes.jsonl", "summary.json", "report.html", "classification.json", "tensorboard", "checkpoints", "best",
    "final",
)  # fmt: skip
# What may change between one start and the next: none of it touches the numbers.
FREE = {"run": ..., "log": ..., "train": {"save_every", "keep"}}


class Run:
    """The folder of one run. The first process alone writes to it."""

    def __init__(self, recipe: BaseRecipe) -> None:
        self.recipe, self.folder = recipe, recipe.folder
        self._handle: int | None = None  # of the folder, locked

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "checkpoints"

    @property
    def final(self) -> Path:
        """Where the result is put, whole or not at all."""
        return self.folder / "final"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.final.is_dir()

    def check(self, fresh: bool) -> None:
        """Raise UserError if the folder holds something that this run must not touch. Writes nothing."""
        for name in self.recipe.log.trackers:
            if find_spec(name) is None:
                raise UserError(f"log.trackers: {name} is not installed; run: pip install {name}")
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run: {folder} is a file; name another folder")
        if not folder.is_dir() or all(path.name.startswith(".writing-") for path in folder.iterdir()):
            return
        saved = folder / "recipe.yaml"
        if not saved.is_file():
            raise UserError(f"run: {folder} holds files but no run (no recipe.yaml); name another folder")
        if fresh:
            return
        try:
            other = load_recipe(saved, [], type(self.recipe))
        except UserError as error:
            raise UserError(
                f"run: {folder} holds another run ({error.problems[0]}); name another folder, "
                "or start over with --fresh"
            ) from None
        changed = _differences(other.model_dump(exclude=FREE), self.recipe.model_dump(exclude=FREE))
        if changed:
            raise UserError(
                f"run: {folder} holds another run, which differs in {'; '.join(changed)}; "
                "name another folder (run=…), or start over with --fresh, which deletes it"
            )

    def resume_point(self, fresh: bool) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what to say of those passed over."""
        return (None, []) if fresh else newest_checkpoint(self.checkpoints)

    def open(self, data: Prepared, fresh: bool, step: int) -> None:
        """Make the folder ready to go on after `step`: what is later is cut off; with `fresh`, all is."""
        self._lock()
        if fresh:
            for name in reversed(OWN):  # what tells whose the folder is goes last
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_atomic(self.folder / "recipe.yaml", dump_recipe(self.recipe))
        write_atomic(self.folder / "environment.json", json.dumps(environment(), indent=1))
        data.ledger.write(self.folder / "ledger.jsonl")
        about = {"train": _described(data.train), "eval": _described(data.eval), "summary": data.summary}
        write_atomic(self.folder / "data.json", json.dumps(about, indent=1, ensure_ascii=False))
        # A checkpoint comes after its step's metrics, but before the answers at the end.
        for name, kept_to in (("metrics.jsonl", step), ("episodes.jsonl", step), ("samples.jsonl", step - 1)):
            if name == "episodes.jsonl" and not (self.folder / name).is_file():
                continue  # PPO's alone
            kept = [line for line in self.records(name) if line["step"] <= kept_to and step > 0]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            write_atomic(self.folder / name, text)

    def _lock(self) -> None:
        """Two runs never write into one folder; the lock lives and dies with this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"run: another process is writing to {self.folder}; wait for it, or stop it") from None

    def close(self) -> None:
        """Let go of the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a JSONL file."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that relies on it

    def summarise(self, numbers: dict[str, Any]) -> None:
        """Write the run's cost."""
        write_atomic(self.folder / "summary.json", json.dumps(numbers, indent=1))

    def last(self, split: str) -> dict[str, Any] | None:
        """The newest line of metrics.jsonl of a split."""
        lines = [record for record in self.records("metrics.jsonl") if record["split"] == split]
        return lines[-1] if lines else None

    def records(self, name: str) -> list[dict[str, Any]]:
        """The lines of a JSONL file; none where there is no file."""
        path = self.folder / name
        records = []
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # the last line, torn by a kill
        return records


def open_trackers(run: Run) -> list[GeneralTracker]:
    """The recipe's trackers, started. Raises UserError for one that cannot start."""
    log, trackers = run.recipe.log, []
    for name in log.trackers:
        kind = LOGGER_TYPE_TO_CLASS[LoggerType(name).value]
        # TensorBoard's folder carries its own name; the others file the run under a project.
        options = {"logging_dir": run.folder} if kind.requires_logging_directory else {}
        try:
            tracker = kind(name if name == "tensorboard" else log.project, **options)
            tracker.start()
        except Exception as error:
            raise UserError(f"log.trackers: {name} cannot start ({str(error).splitlines()[0]})") from None
        trackers.append(tracker)
    return trackers


def _described(examples: Examples) -> dict[str, Any]:
    counts, edges = np.histogram(examples.lengths, bins=min(40, max(1, len(examples)))) if len(examples) else ([], [])
    return {
        "examples": len(examples),
        "tokens": int(examples.lengths.sum()),
        "trained_tokens": int(examples.labels.sum()),
        "lengths": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [d for k in keys for d in _differences(there.get(k), here.get(k), f"{name}.{k}".lstrip("."))]
    return [] if there == here else [f"{name}: {json.dumps(there)} there, {json.dumps(here)} here"]
