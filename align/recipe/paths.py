"""Paths as users write them: `~` and environment variables are expanded here, and nowhere else."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from align.recipe.errors import UserError

VARIABLE = re.compile(r"\$(?:\{([^{}]*)\}|([A-Za-z_]\w*))")
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux


def expanded(path: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` replaced; expanding the result again changes nothing.

    Raises UserError for a variable that is not set, and for what cannot be a path, such as an empty text.
    """

    def value(found: re.Match) -> str:
        name = found[2] if found[1] is None else found[1]
        if name not in os.environ:
            raise UserError(f"the environment variable {name} is not set, in {path[:80]!r}")
        return os.environ[name]

    whole = os.path.expanduser(VARIABLE.sub(value, path))
    if not whole.strip():
        raise UserError(f"{path[:80]!r} is empty, so it names no file; name one, or leave it out")
    if VARIABLE.search(whole):
        raise UserError(f"{path[:80]!r} stands for {whole[:80]!r}, which holds a variable itself; write it out")
    try:
        raw = os.fsencode(whole)
    except UnicodeEncodeError:
        raise UserError(f"{path[:80]!r} holds half a character, so it names no file") from None
    if b"\0" in raw:
        raise UserError(f"{path[:80]!r} holds a NUL character, so it names no file")
    if len(raw) > LONGEST_PATH or max(map(len, raw.split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{path[:60] + '…'!r} is too long for the name of a file")
    return whole


def location(path: str) -> str:
    """The same of what a recipe can hold, which is UTF-8."""
    whole = expanded(path)
    if re.search("[\ud800-\udfff]", whole):  # bytes of a name that a recipe, which is UTF-8, cannot hold
        raise UserError(f"{path[:80]!r} stands for a name that is not UTF-8; give the file another name")
    return whole


Location = Annotated[str, AfterValidator(location)]
"""A path, or a name that stands where a path may, in a recipe; validated, it is expanded."""
