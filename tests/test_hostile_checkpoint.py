"""Checkpoints that somebody changed: every file cut, emptied, replaced. A run goes on exactly, or says why it does not.

A manifest tells what has changed by accident, not who wrote it: here it is made anew, so that it holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from world import align, metrics, weights

from align.recipe.errors import UserError
from align.recipe.schema import Optim
from align.training.runs.checkpoint import load_state, newest_checkpoint, save_checkpoint
from align.training.runs.state import adamw, capture, restore, state_of, trained_parameters

NAMES = ("model.safetensors", "optimizer.safetensors", "state.json")
STATE = {
    "step": 2, "place": 8, "tokens_seen": 100, "elapsed_seconds": 1.5, "memory": {}, "identity": {}, "portions": {},
    "fingerprint": "f",
    "lora": None, "labels": None,
}  # fmt: skip


def learner() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Two steps of something small."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = adamw(model, Optim(learning_rate=0.1), {})
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return trained_parameters(model), optimizer


@pytest.fixture
def point(tmp_path):
    """Its checkpoint, after an earlier one."""
    named, optimizer = learner()
    save_checkpoint(tmp_path, 1, capture(named, optimizer), STATE | {"step": 1}, keep=2)
    return save_checkpoint(tmp_path, 2, capture(named, optimizer), STATE, keep=2)


def sealed(point: Path) -> None:
    """A manifest that fits what now lies there."""
    manifest = json.loads((point / "manifest.json").read_text())
    for name in manifest["files"]:
        raw = (point / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (point / "manifest.json").write_text(json.dumps(manifest))


def gone_on(point: Path) -> None:
    """As a run does at its start; raises UserError in a line that names the checkpoint, with nothing put back."""
    named, optimizer = learner()
    before = {name: p.detach().clone() for name, p in named.items()}
    try:
        found, _ = newest_checkpoint(point.parent)
        assert found == point
        state_of(point, load_state(point))
        restore(point, named, optimizer, "f")
    except UserError as error:
        (line,) = error.problems
        assert line.startswith(str(point)), line
        assert len(line) < 400, line
        assert all(torch.equal(before[name], p) for name, p in named.items())
        raise


def changed_tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        name = max(tensors, key=lambda name: tensors[name].ndim)
        save_file(tensors | {name: change(tensors[name]).contiguous()}, file)

    return damage


def state(**values: object) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def written(raw: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(raw)


TENSORS = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "emptied": written(b""),
    "a header without end": written(b"\xff" * 64),
    "a pickle": written(b"\x80\x04\x95.\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."),
    "no tensors": lambda file: save_file({}, file),
    "another shape": changed_tensors(lambda t: t[:1]),
    "turned": changed_tensors(lambda t: t.T),
    "integers": changed_tensors(lambda t: t.int()),
    "not a number": changed_tensors(lambda t: t * math.nan),
    "infinite": changed_tensors(lambda t: t + math.inf),
    "one more": lambda file: save_file(load_file(file) | {"evil": torch.zeros(3)}, file),
}
STATES = {
    "emptied": written(b""),
    "a list": written(b"[]"),
    "deep": written(b"[" * 100_000),
    "no text": written(b"\xff\xfe{}"),
    "nothing": written(b"{}"),
    "step a text": state(step="2"),
    "step below 0": state(step=-1),
    "a far step": state(step=10**30),
    "a far place": state(place=10**18),
    "another step": state(step=1),
    "another trunk": state(fingerprint="\x1b[2J"),
    "an identity in a list": state(identity=[]),
    "memory a list": state(memory=[]),
    "time": state(elapsed_seconds="much"),
    "endless time": state(elapsed_seconds=math.nan),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", NAMES[:2])
def test_tensors_under_a_manifest_that_fits(point, name, kind):
    gone_on(point)
    TENSORS[kind](point / name)
    sealed(point)
    with pytest.raises(UserError):
        gone_on(point)


@pytest.mark.parametrize("kind", STATES)
def test_a_state_under_a_manifest_that_fits(point, kind):
    STATES[kind](point / "state.json")
    sealed(point)
    with pytest.raises(UserError):
        gone_on(point)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "its manifest has no state.json"),
        ([], "its manifest has no state.json"),
        ({"state.json": 1}, "manifest.json is damaged"),
        ({"state.json": {}, "../step-000001/state.json": {}}, "is no file in it"),
        ({"/dev/zero": {"bytes": 0, "sha256": ""}}, "/dev/zero is no file in it"),  # which would be read without end
        ({"link": {"bytes": 0, "sha256": ""}}, "link is no file in it"),
    ],
)
def test_manifests_that_name_other_files_are_passed_over(point, files, fault):
    manifest = json.loads((point / "manifest.json").read_text())
    whole = manifest["files"] if isinstance(files, dict) and files and "state.json" not in files else {}
    if "../" in str(files):
        files = manifest["files"] | {"../step-000001/state.json": {}}
    (point / "link").symlink_to("/dev/zero")
    (point / "manifest.json").write_text(json.dumps(manifest | {"files": {**whole, **files} if files else files}))
    found, (told,) = newest_checkpoint(point.parent)
    assert found.name == "step-000001"
    assert fault in told


@pytest.fixture(scope="module")
def trained(world, cache, tmp_path_factory):
    """A run of two steps, which was asked for one more, with a checkpoint after each; its recipe."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        patch.chdir(folder)
        train = {"steps": 3, "eval_every": None, "save_every": 1}
        recipe = world.recipe(folder / "recipe.yaml", run="run", train=train, data={"eval": {"sources": []}})
        assert align(recipe).status == 0
    shutil.copytree(folder / "run", folder / "whole")
    shutil.rmtree(folder / "run/checkpoints/step-000003")
    shutil.rmtree(folder / "run/final")
    return folder


@pytest.mark.parametrize("name", ["optimizer.safetensors", "manifest.json"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained, here, name):
    """And ends as if nothing had happened."""
    run = shutil.copytree(trained, here, dirs_exist_ok=True) / "run"
    file = run / "checkpoints/step-000002" / name
    file.write_bytes(file.read_bytes()[:-5])
    told = align("recipe.yaml")
    assert (told.status, told.err) == (0, "")
    assert "step-000002 is passed over: " in told.out
    assert metrics(run) == metrics(here / "whole")
    assert all(torch.equal(tensor, weights(here / "whole")[name]) for name, tensor in weights(run).items())


def test_a_run_refuses_what_it_cannot_go_on_with_and_takes_nothing_away(trained, here):
    run = shutil.copytree(trained, here, dirs_exist_ok=True) / "run"
    point = run / "checkpoints/step-000002"
    TENSORS["not a number"](point / "model.safetensors")
    sealed(point)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "checkpoints" in path.parts}
    told = align("recipe.yaml")
    assert told.status == 2
    assert told.err.startswith("run/checkpoints/step-000002 cannot be gone on with: its ")
    assert told.err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "final").exists()
