"""The file of a recipe as text, or why there is none."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from align.recipe.errors import UserError

MAX_BYTES = 2**18


def recipe_text(path: Path) -> str:
    """Its text. Raises UserError for what is no file of UTF-8 of a recipe's size."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: this is a folder; name a recipe file in it")
        if not path.exists():
            raise UserError(f"{path}: no such recipe{_beside(path)}")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: not a recipe, which is a YAML file of a few kilobytes")
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _beside(path: Path) -> str:
    names = {p.stem: p for p in sorted(path.parent.glob("*.y*ml"))} if path.parent.is_dir() else {}
    close = get_close_matches(path.stem, names, 1)
    return f"; did you mean '{names[close[0]]}'?" if close else ""
