"""What a run is, besides its recipe: its examples in their order, how they were written as tokens, and the weights that
it stands on. It is kept with the run and in each checkpoint, so that a resume on something else is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from align.data.examples import Examples
from align.data.formats.prompts import asked
from align.data.store import writer_of
from align.models.base import base_folder
from align.models.checkpoints.fingerprints import ELSEWHERE, result_fingerprint, weights_fingerprint
from align.models.checkpoints.sources import first_line, is_file
from align.recipe.errors import UserError
from align.recipe.schema import BaseRecipe

NAMED = 5  # files that a message names one by one


class _File(TypedDict):
    examples: int
    bytes: int | None
    hash: str


class _Side(TypedDict):
    examples: int
    hash: str
    files: dict[str, _File]


class Identity(TypedDict):
    """As JSON holds it."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    sides: dict[str, _Side]
    template: str
    tokenizer: str
    base: str
    settings: str  # of the base
    results: dict[str, str | None]
    answered: NotRequired[str]


IDENTITY = TypeAdapter(Identity)


def read_identity(value: Any, where: str) -> Identity:
    """What was written of a run, `where` it stands. Raises UserError where it is nothing that align writes."""
    try:
        return IDENTITY.validate_python(value)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("identity", *fault["loc"])))
        raise UserError(
            f"{where} does not say what the run was trained on ({place}: {fault['msg']}); restore the file, or start "
            "over with --fresh"
        ) from None


def identity_of(
    recipe: BaseRecipe,
    tokenizer: PreTrainedTokenizerBase,
    sides: Mapping[str, Examples],
    results: Mapping[str, str] | None = None,
    records: bool = False,
    answered: str | None = None,
) -> Identity:
    """What the run with these `sides`, by name, is.

    `results`: recipe key -> folder of another result that it uses, such as a reward. With `records` the rows count as
    their files have them, because something reads more of them than their tokens. `answered`: a hash of the prompts
    that it answers.
    """
    writer = writer_of(tokenizer)
    folder = base_folder(recipe.model)
    adapters = recipe.model.adapter or []
    adapters = [adapters] if isinstance(adapters, str) else adapters
    folders = {f"model.adapter {name}": name for name in adapters} | dict(results or {})
    return {
        "sides": {name: _side(examples, records) for name, examples in sides.items() if len(examples)},
        "template": _hash(writer.pop("chat")),
        "tokenizer": _hash(writer),
        "base": _base(folder, recipe.model.init == "random"),
        "settings": _settings(folder),
        "results": {key: _result(Path(name)) for key, name in folders.items()},
    } | ({"answered": answered} if answered else {})


def changes(there: Identity, here: Identity) -> list[str]:
    """What is different here, in words; nothing where all is the same."""
    found = []
    for key, what in (("template", "the chat template has changed"), ("tokenizer", "the tokenizer has changed")):
        if there[key] != here[key]:
            found.append(what)
    for side in dict.fromkeys([*there["sides"], *here["sides"]]):
        found += _side_changes(side, there["sides"].get(side, NONE), here["sides"].get(side, NONE), bool(found))
    if there["base"] != here["base"]:
        found.append(f"the weights of model.base have changed (fingerprint {there['base']} there, {here['base']} here)")
    elif there["settings"] != here["settings"]:
        found.append("the config.json of model.base, or what its generation_config.json says of ends, has changed")
    if there.get("answered") != here.get("answered"):
        found.append("the prompts of train.generate, or the answers that their rows have, have changed")
    for key in dict.fromkeys([*there["results"], *here["results"]]):
        if there["results"].get(key) != here["results"].get(key):
            found.append(f"{key}: its weights or its configuration have changed")
    return found


NONE: _Side = {"examples": 0, "hash": "", "files": {}}


def _side(examples: Examples, records: bool) -> _Side:
    """The examples of one side: how many, the hash of all in their order, and the same of each file."""
    whole, files = sha256(), {}
    for part in examples.parts:
        content, owner = part.store.content[part.rows], part.store.file_id[part.rows]
        whole.update(content.tobytes())
        for number in np.unique(owner):
            name, own = part.store.files[number], content[owner == number]
            known = files.setdefault(name, {"examples": 0, "bytes": _size(name), "hash": ""})
            known["examples"] += len(own)
            known["hash"] = _hash([known["hash"], own.tobytes().hex()])
    if records:
        for row in asked(examples):
            whole.update(json.dumps(row.record, sort_keys=True, default=str).encode())
    return {"examples": len(examples), "hash": whole.hexdigest()[:16], "files": files}


def _side_changes(side: str, there: _Side, here: _Side, explained: bool) -> Iterator[str]:
    """`explained`: another template or tokenizer already is why the same rows have other tokens."""
    if there["hash"] == here["hash"]:
        return
    old, new = there["files"], here["files"]
    told = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            told.append(f"no row of {name} here")
        elif name not in old:
            told.append(f"no row of {name} there")
        elif old[name] != new[name]:
            sizes = f"{old[name]['bytes']:,} bytes there, {new[name]['bytes']:,} here" if new[name]["bytes"] else ""
            rows = f"{old[name]['examples']:,} rows there, {new[name]['examples']:,} here"
            same = old[name]["bytes"] == new[name]["bytes"]
            if not (explained and same):
                told.append(f"{name} has changed ({'of the same size' if same and sizes else sizes or rows})")
    if explained and not told and there["examples"] == here["examples"]:
        return
    counts = f"{there['examples']:,} examples there, {here['examples']:,} here"
    if there["examples"] == here["examples"]:
        counts = f"{here['examples']:,} examples there and here, but others or in another order"
    more = [f"and {len(told) - NAMED:,} more files"] if len(told) > NAMED else []
    yield f"{side}: " + ", ".join([counts, *told[:NAMED], *more])


def _base(folder: Path, of_config: bool) -> str:
    """The fingerprint of the base's weights, or where they are new, the hash of what they are made from."""
    try:
        return _hash((folder / "config.json").read_text("utf-8")) if of_config else weights_fingerprint(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.base: {folder} cannot be loaded ({str(error).splitlines()[0][:200]})") from None


def _settings(folder: Path) -> str:
    """The hash of what a base computes its numbers by, besides its weights, and of what ends its answers."""
    told = {}
    for name in ("config.json", "generation_config.json"):
        try:
            values = dict(json.loads((folder / name).read_bytes())) if is_file(folder / name) else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"model.base: {folder / name}: it is damaged ({first_line(error)})") from None
        told[name] = {key: value for key, value in values.items() if key not in ELSEWHERE}
    return _hash([told["config.json"], told["generation_config.json"].get("eos_token_id")])


def _result(folder: Path) -> str | None:
    """None for what is no folder here: a hub id."""
    return result_fingerprint(folder) if folder.is_dir() else None


def _size(name: str) -> int | None:
    path = Path(name)
    return path.stat().st_size if path.is_file() else None


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
