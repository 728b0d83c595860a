"""Checkpoints that are whole or absent.

A checkpoint is a folder: safetensors files, `state.json` and, written last, `manifest.json` with every file's
size and SHA-256. It is written as `.writing-step-000020`, fsynced and renamed to `step-000020`, so a kill at
any moment leaves what was there before. A folder that has to go is first renamed to `.old-step-000020`. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.models.checkpoints.sources import foreign
from align.recipe.errors import UserError
from align.recipe.records import parsed, to_json
from align.training.runs.durable import speaking, sync

FORMAT = 1
Tensors = dict[str, dict[str, Tensor]]  # file name without suffix -> name -> tensor


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-XXXXXX` durably, replacing one of the same step, then leave only the newest `keep`.

    `tensors`: one safetensors file per entry, each tensor `copied`; `state`: what JSON can hold. Returns the
    checkpoint's path. Raises UserError when the disk is full or refuses; earlier ones then stay whole.
    """
    return _write(folder, step, tensors, to_json(state), keep)


def newest_checkpoint(folder: Path, only: str | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint, or the one of that name, whose sizes and hashes hold; and a sentence on each newer one,
    passed over."""
    passed_over = []
    for _, in_place, path in sorted(_checkpoints(folder), reverse=True):
        if only not in (None, path.name):
            continue
        if (fault := _fault(path)) is None:
            return path, passed_over
        if in_place:  # one that was being deleted needs no excuse
            passed_over.append(f"{path} is passed over: {fault}.")
    return None, passed_over


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors, on the CPU, and the state of a checkpoint that `newest_checkpoint` found.

    A manifest says that nothing has changed since, not who wrote it: raises UserError for what align does not write.
    """
    with foreign(f"{path} cannot be read"):
        names = [Path(name) for name in json.loads((path / "manifest.json").read_text())["files"]]
        tensors = {name.stem: load_file(path / name) for name in names if name.suffix == ".safetensors"}
    return tensors, load_state(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that `newest_checkpoint` found. Raises UserError where it is damaged."""
    with foreign(f"{path} cannot be read"):
        state = parsed((path / "state.json").read_bytes())
    if state is None:
        raise UserError(f"{path} cannot be read (state.json holds no JSON object)")
    return state


def tidy_checkpoints(folder: Path) -> None:
    """Put back what a kill left aside of a checkpoint that was being replaced, and delete all else it left."""
    for stale in folder.glob(".writing-step-*"):
        shutil.rmtree(stale)
    for aside in folder.glob(".old-step-*"):
        home = folder / aside.name.removeprefix(".old-")
        if _fault(aside) is None and _fault(home) is not None:
            shutil.rmtree(home, ignore_errors=True)
            aside.rename(home)
        else:
            shutil.rmtree(aside)


def trim_checkpoints(point: Path, keep: int) -> None:
    """Delete what a kill right after `point` was written left: all older ones but the newest `keep` - 1."""
    there = sorted(_checkpoints(point.parent), reverse=True)
    newest = [path for _, _, path in there].index(point)
    for *_, path in there[newest + keep :]:
        _discard(path)


class CheckpointWriter:
    """Saves in a background thread while training goes on, one checkpoint at a time."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # joined when the interpreter exits, so no save is cut off
        self._last: Future[float] | None = None
        self._held = self._begun = 0.0

    def begin(self) -> None:
        """Before the tensors of a save are made: wait for the previous one, so that one copy is held, and raise its
        error."""
        self._held = time.perf_counter()
        self.wait()
        self._begun = time.perf_counter()

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> float:
        """After `begin`: start writing, and return the seconds that training was held up.

        `tensors`: as for `save_checkpoint`; nobody changes them any more.
        """
        text, begun = to_json(state), self._begun

        def write() -> float:
            _write(self.folder, step, tensors, text, self.keep)
            return time.perf_counter() - begun

        self._last = self._thread.submit(write)
        return time.perf_counter() - self._held

    def wait(self) -> float:
        """Wait for the last save; the seconds from its start until it was durable (0.0 if there was none).

        Raises the UserError of a save that failed, once.
        """
        if self._last is None:
            return 0.0
        try:
            return self._last.result()
        except UserError:
            self._last = None
            raise


def copied(tensor: Tensor) -> Tensor:
    """Its numbers on the CPU, contiguous, in a storage of their own."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(folder: Path, step: int, tensors: Tensors, state: str, keep: int) -> Path:
    assert min(step, keep - 1) >= 0, (step, keep)
    path, writing, old = (folder / f"{prefix}step-{step:06d}" for prefix in ("", ".writing-", ".old-"))
    size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    with speaking(path, size):
        tidy_checkpoints(folder)  # a run may have been killed while it saved
        try:
            writing.mkdir(parents=True)
            for part, named in tensors.items():
                save_file(named, writing / f"{part}.safetensors")
            (writing / "state.json").write_text(state, "utf-8")
            files = {file.name: _measure(file) for file in sorted(writing.iterdir())}
            manifest = {"format": FORMAT, "step": step, "files": files}
            (writing / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for file in (*writing.iterdir(), writing):
                sync(file)
        except (OSError, SafetensorError):
            shutil.rmtree(writing, ignore_errors=True)
            raise
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)  # until the next line it is `.old-…` that newest_checkpoint finds
        writing.rename(path)
        sync(folder)
        _prune(folder, path, keep)
    return path


def _prune(folder: Path, saved: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole ones (by size: hashing would read them all); `saved` stays."""
    for old in folder.glob(".old-step-*"):
        shutil.rmtree(old)
    others = [path for *_, path in sorted(_checkpoints(folder), reverse=True) if path != saved]
    kept = [path for path in others if _fault(path, hashes=False) is None][: keep - 1]
    for path in set(others) - set(kept):
        _discard(path)


def _discard(path: Path) -> None:
    shutil.rmtree(path.rename(path.with_name(f".old-{path.name}")))


def _checkpoints(folder: Path) -> Iterator[tuple[int, bool, Path]]:
    """Step, whether in place (not renamed to `.old-…`), path: the last in sorting order is the best."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"(\.old-)?step-([0-9]{6,})", path.name):
            yield int(match[2]), not match[1], path


def _fault(path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        if not (path / "manifest.json").is_file():
            return "manifest.json is no file in it"
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version of align reads {FORMAT}"
        if manifest["step"] != int(path.name.rpartition("-")[2]):
            return f"its manifest is that of step {manifest['step']}"
        if "state.json" not in manifest["files"]:
            return "its manifest has no state.json"
        for name, expected in manifest["files"].items():
            if Path(name).name != name or not (path / name).is_file():  # else it may name a device, which has no end
                return f"{name} is no file in it"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} holds {size} bytes, its manifest says {expected['bytes']}"
            if hashes and _measure(path / name) != expected:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is damaged"
    return None


def _measure(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
