"""What goes into a set besides its recipe: files of rows, test sets, a tokenizer, a model; by names and hashes."""

from __future__ import annotations

import sys
from hashlib import file_digest
from pathlib import Path
from typing import Any

from align.data.formats.prompts import PROMPTING
from align.data.preparing.reading import ALL
from align.data.store import content_of
from align.models.checkpoints.fingerprints import weights_fingerprint
from align.models.checkpoints.sources import base_folder, is_file, speaking_of
from align.recipe.errors import UserError
from align.recipe.schema import Model
from align.recipe.section import Section


def inputs_of(recipe: Section) -> list[list[Any]]:
    """Names and hashes. Raises UserError for what cannot be read."""
    found = [line for source in recipe.sources for line in content_of(source, ALL)]
    steps = recipe.prepare
    against = steps.decontaminate.against if steps.decontaminate else []
    found += [line for source in against for line in content_of(source, PROMPTING)]
    if steps.privacy and steps.privacy.names:
        with speaking_of("prepare.privacy.names"):
            found.append([steps.privacy.names, weights_fingerprint(base_folder(Model(base=steps.privacy.names)))])
    if perplexity := steps.filter.perplexity:
        with speaking_of("prepare.filter.perplexity.model"):
            found.append([perplexity.model, weights_fingerprint(base_folder(Model(base=perplexity.model)))])
    files = [Path(words.file) for words in steps.filter.words if words.file]
    files += [file for name in steps.filter.functions if (file := file_of(name))]
    files += [file for score in steps.filter.scores for file in sorted(Path(score.classifier).glob("*.*"))]
    files += [tokenizer_file(recipe.tokenizer)] if recipe.tokenizer else []
    return found + [[str(path), _digest(path)] for path in files if path.is_file()]


def check_apart(recipe: Section) -> None:
    """Raise UserError where the set would lie in a folder of its own sources, which would be read with it in it."""
    run = Path(recipe.run).resolve()
    for source in recipe.sources:
        folder = Path(source.path).resolve()
        if folder.is_dir() and run.is_relative_to(folder):
            raise UserError(
                f"run: {recipe.run} lies in {source.path}, a source: the next run would read this set as rows; name "
                "another folder"
            )


def file_of(function: str) -> Path | None:
    """The file of a function of the user's own, `package.module:function`, where it can be told without running it."""
    place = Path(*function.partition(":")[0].split("."))
    files = (Path(folder) / place.with_suffix(".py") for folder in (".", *sys.path))
    return next((file for file in files if file.is_file()), None)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json that the recipe's `tokenizer` names. Raises UserError where there is none."""
    if is_file(name):
        return Path(name)
    with speaking_of("tokenizer"):
        file = base_folder(Model(base=name)) / "tokenizer.json"
    if not is_file(file):
        raise UserError(f"tokenizer: {name} has no tokenizer.json; name the checkpoint of a fast tokenizer")
    return file
