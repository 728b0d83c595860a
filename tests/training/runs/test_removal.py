"""A run goes from its folder whole or not at all, and with it goes nothing that is not its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from world import tree

from align.recipe.schema import BaseRecipe, Data, Model, Source
from align.training.runs.removal import (
    ASIDE,
    OWN,
    finish_removal,
    forget_removal,
    is_free,
    is_run,
    remove_run,
    run_recipe,
)

OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "open"}  # audited by Python
FOREIGN = ("notes.txt", "checkpoints/best of them.txt", "eval/table.csv")


def make_run(folder: Path) -> Path:
    """A run with all that one can have, things of its user's, and links to what lies elsewhere."""
    recipe = BaseRecipe(stage="sft", run="x", model=Model(base="x"), data=Data(train=[Source(path="x")]))
    elsewhere = folder.parent / f"{folder.name} elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "step-000009").mkdir()
    (elsewhere / "step-000009" / "weights").write_text("precious")
    for name in OWN:
        inner = {"checkpoints": "step-000001/state.json", "tensorboard": "1/events"}.get(name, "align.json")
        path = folder / name / inner if "." not in name else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "best" / "align.json").unlink()
    (folder / "best").rmdir()
    (folder / "best").symlink_to(elsewhere)
    (folder / "checkpoints" / "step-000002").symlink_to(elsewhere / "step-000009")
    (folder / "recipe.yaml").write_text(run_recipe(recipe))
    return folder


def killed_at(moment: int, folder: Path) -> bool:
    """Remove the run; kill -9 ourselves before file operation number `moment`; False if there are not so many."""
    if (pid := os.fork()) == 0:
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event not in OPERATIONS:
                return
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        remove_run(folder)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_killed_before_any_file_operation_it_is_there_or_gone(tmp_path):
    before, moment, kept, gone = tree(make_run(tmp_path / "whole")), 1, 0, 0
    while killed_at(moment, folder := make_run(tmp_path / str(moment))):
        finish_removal(folder)
        if is_run(folder):
            kept += 1
            forget_removal(folder)
            assert tree(folder) == before
        else:
            gone += 1
            assert is_free(folder)  # though other files are here, a run may begin
            forget_removal(folder)
            assert set(tree(folder)) == {*FOREIGN}
        elsewhere = tmp_path / f"{moment} elsewhere" / "step-000009" / "weights"
        assert elsewhere.read_text() == "precious"
        moment += 1
    assert kept > 1
    assert gone > len(OWN)
    assert set(tree(folder)) == {*FOREIGN, ".old-run/recipe.yaml"}
    assert not (folder / "best").is_symlink()


def test_only_what_a_run_wrote_makes_a_run(tmp_path):
    folder = make_run(tmp_path / "run")
    assert is_run(folder)
    text = (folder / "recipe.yaml").read_text()
    for other in (
        text.partition("\n")[2],
        text.partition("\n")[0],
        text.replace("stage: sft", "stage: bake"),
        "[",
        "\0",
    ):
        (folder / "recipe.yaml").write_text(other)
        assert not is_run(folder)
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe")
    assert not is_run(folder)
    assert not is_free(folder)
    assert not is_run(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".writing-recipe.yaml").touch()
    (tmp_path / "new" / ASIDE).mkdir()
    assert is_free(tmp_path / "new")
