"""Checkpoints come back as they were saved, the newest ones stay, and damaged ones are passed over."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from align.recipe.errors import UserError
from align.training.runs import checkpoint
from align.training.runs.checkpoint import CheckpointWriter, copied, load_checkpoint, newest_checkpoint, save_checkpoint
from align.training.runs.durable import published, write_atomic


def parts(value: float) -> dict:
    return {"model": {"w": torch.full((3000,), value)}, "optimizer": {"m": torch.full((2, 2), value)}}


def save(folder: Path, step: int, keep: int = 2, value: float | None = None) -> Path:
    value = step if value is None else value
    return save_checkpoint(folder, step, parts(value), {"value": value}, keep)


def written(writer: CheckpointWriter, step: int, state: dict) -> float:
    """A save as a run begins and makes it."""
    writer.begin()
    return writer.save(step, parts(float(step)), state)


def value_of(path: Path) -> float:
    """The one number that all of a checkpoint holds."""
    tensors, state = load_checkpoint(path)
    assert tensors.keys() == {"model", "optimizer"}
    assert torch.equal(tensors["model"]["w"], torch.full((3000,), state["value"]))
    assert torch.equal(tensors["optimizer"]["m"], torch.full((2, 2), state["value"]))
    return state["value"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "model": {"scalar": torch.tensor(2.5), "half": base.bfloat16(), "turned": base.T, "row": base[1],
                  "all": base},
        "optimizer": {"step": torch.tensor(7), "wide": torch.ones(1).expand(5), "none": torch.zeros(0, 3),
                      "flag": torch.tensor([True, False]), "grad": torch.ones(2, requires_grad=True)},
        "empty": {},
    }  # fmt: skip
    state = {"step": 3, "rng": [1, 2**63], "lr": 5e-324, "name": "你好", "nothing": None}
    copies = {part: {name: copied(tensor) for name, tensor in own.items()} for part, own in tensors.items()}
    path = save_checkpoint(tmp_path / "deep" / "er", 3, copies, state, keep=1)
    assert path == tmp_path / "deep" / "er" / "step-000003"
    assert newest_checkpoint(path.parent) == (path, [])
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    assert {part: set(named) for part, named in loaded.items()} == {part: set(t) for part, t in tensors.items()}
    for part, named in tensors.items():
        for name, tensor in named.items():
            assert loaded[part][name].dtype == tensor.dtype
            assert torch.equal(loaded[part][name], tensor)
            loaded[part][name].data.zero_()  # must not reach the file
    assert newest_checkpoint(path.parent) == (path, [])


def test_no_checkpoints(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "other").touch()
    assert newest_checkpoint(tmp_path) == (None, [])
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert newest_checkpoint(tmp_path)[0].name == "step-1000000"
    save(tmp_path, 1_000_000, keep=2, value=0.5)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert value_of(tmp_path / "step-1000000") == 0.5


def test_a_broken_one_does_not_count_among_those_kept(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "step-000002" / "state.json").write_text("")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_what_was_just_saved_stays_even_below_a_newer_step(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-000003"]


def damage(path: Path, how: str) -> None:
    match how:
        case "truncated":
            os.truncate(path / "model.safetensors", 100)
        case "flipped":
            raw = bytearray((path / "optimizer.safetensors").read_bytes())
            raw[-1] ^= 1
            (path / "optimizer.safetensors").write_bytes(raw)
        case "missing":
            (path / "state.json").unlink()
        case "no manifest":
            (path / "manifest.json").unlink()
        case "half a manifest":
            os.truncate(path / "manifest.json", 60)
        case "odd manifest":
            (path / "manifest.json").write_text('{"format": 1, "step": 9, "files": {"state.json": 3}}')
        case "future":
            text = (path / "manifest.json").read_text()
            (path / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
        case "renamed":
            path.rename(path.with_name("step-000010"))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("truncated", "model.safetensors holds 100 bytes, its manifest says 24072"),
        ("flipped", "optimizer.safetensors has changed since it was written (its SHA-256 differs)"),
        ("missing", "state.json is no file in it"),
        ("no manifest", "manifest.json is no file in it"),
        ("half a manifest", "manifest.json is damaged"),
        ("odd manifest", "manifest.json is damaged"),
        ("future", "its format is 2, this version of align reads 1"),
        ("renamed", "its manifest is that of step 9"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, how, why):
    whole, broken = save(tmp_path, 8), save(tmp_path, 9)
    damage(broken, how)
    path, (sentence,) = newest_checkpoint(tmp_path)
    assert path == whole
    assert sentence.endswith(f" is passed over: {why}.")
    assert sentence.startswith(str(tmp_path / "step-0000"))


def test_the_writer_returns_before_it_has_written(tmp_path, monkeypatch):
    go = threading.Event()
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *args: (go.wait(), write(*args)))
    writer = CheckpointWriter(tmp_path, keep=3)
    assert writer.wait() == 0
    state = {"value": 1.0}
    blocking = written(writer, 1, state)
    state.update(value=0)
    assert newest_checkpoint(tmp_path) == (None, [])  # still waiting
    time.sleep(0.05)
    go.set()
    durable = writer.wait()
    assert durable >= 0.05
    assert blocking < durable
    assert value_of(newest_checkpoint(tmp_path)[0]) == 1
    for value in (2.0, 3.0):  # one after the other, without a wait between
        written(writer, int(value), {"value": value})
    writer.wait()
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


def test_the_next_save_raises_the_error_of_the_last(tmp_path):
    blocker = tmp_path / "checkpoints"
    blocker.touch()
    writer = CheckpointWriter(blocker, keep=1)
    written(writer, 1, {})
    with pytest.raises(UserError, match="cannot be written"):
        writer.begin()
    blocker.unlink()
    written(writer, 3, {"value": 3.0})
    writer.wait()
    assert value_of(newest_checkpoint(blocker)[0]) == 3


def test_write_atomic(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomic(path, json.dumps({"n": "你"}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"n": "你"}
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["b.json"]


def test_what_is_published_replaces_the_one_before_or_leaves_it(tmp_path):
    final = tmp_path / "final"
    for text in ("first", "second"):
        with published(final, 0) as beside:
            (beside / text).write_text(text)
    assert [path.name for path in final.iterdir()] == ["second"]
    with pytest.raises(UserError, match="cannot be written"), published(final, 0) as beside:
        (beside / "no such folder" / "third").write_text("half")
    assert [path.name for path in final.iterdir()] == ["second"]
