"""The files that a recipe reads: whether they are there, and what is in them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.data.files.paths import data_files, is_hub_id
from align.recipe.document import Keys
from align.recipe.errors import UserError
from align.recipe.help import choices
from align.recipe.schema import Source
from align.tools.pipeline.references import UNFILLED
from align.tools.pipeline.written import Written, gathering

OUTPUTS = ("run", "log")  # what these sections name is written or shown, not read
ENGINE = "engine"  # in any section: what is asked there, and the folder that adapters are written to for it
RESULTS = {
    "adapter": "the `final/`",
    "policy": "the `final/`",
    "against": "the folder",
    "start_from": "the folder",
    "classifier": "the `final/`",
}  # of earlier runs
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function


def walk(value: Any, kind: Any = None, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every section and every text below a recipe, with its keys; texts that are one of a few words are left out."""
    if isinstance(value, BaseModel):
        yield keys, value
        for name, field in type(value).model_fields.items():
            if name != ENGINE and (keys or name not in OUTPUTS):
                yield from walk(getattr(value, name), field.annotation, (*keys, name))
    elif isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(below, None, (*keys, key))
    elif isinstance(value, str) and value not in choices(kind):
        yield keys, value


def missing(recipe: BaseModel, document: Written, made: Collection[Path]) -> list[str]:
    """Problems, each with its line: data files and adapters that are not there, and that no stage will make."""
    problems: list[str] = []
    for keys, value in walk(recipe):
        path = value.path if isinstance(value, Source) else value
        if isinstance(path, BaseModel) or path == UNFILLED or any(Path(path).is_relative_to(folder) for folder in made):
            continue
        if isinstance(value, Source) and not is_hub_id(path):
            where = document.place((*keys, "path")).where
            with gathering(problems):
                try:
                    data_files(path)
                except UserError as error:
                    raise UserError(*(f"{where}: {problem}" for problem in error.problems)) from None
        elif (name := next(key for key in reversed(keys) if isinstance(key, str))) in RESULTS and not Path(
            path
        ).is_dir():
            problems.append(
                f"{document.place(keys).where}: {path}: no such folder; give {RESULTS[name]} of a finished run"
            )
    return problems


def digests(recipe: BaseModel) -> dict[str, str]:
    """Path -> digest of every file and folder that the recipe names; of a Python function, its file's."""
    found = {}
    for _, text in walk(recipe):
        if isinstance(text, Source) and not is_hub_id(text.path):  # a pattern, or a folder with links in it
            with suppress(UserError):  # what is missing is told by `missing`
                found |= {str(file): digest(file) for file in data_files(text.path)}
        if isinstance(text, str):
            if FUNCTION.fullmatch(text):
                text = text.partition(":")[0].replace(".", "/") + ".py"
            if os.path.exists(text):  # False, where Path.exists raises, for a text that can be no path
                found[text] = digest(Path(text))
    return found


_known: dict[tuple, str] = {}  # within this process; a file's ctime tells even a change that restores its mtime


def digest(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of all files below a folder."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        content = "".join(f"{p.relative_to(path).as_posix()} {digest(p)}\n" for p in files)
        return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()
    about = path.stat()
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]
