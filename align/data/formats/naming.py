"""The names that a file gives to columns, to the keys of turns and to who speaks, as the recipe maps them to ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from statistics import mean
from typing import Any

from align.data.formats.message import READ, ROLES
from align.data.formats.shown import in_yaml, listed, meant, shown
from align.data.formats.verdicts import MARKS
from align.recipe.errors import UserError
from align.recipe.schema import Source

TURN_KEYS = ("role", "content", *(key for keys in READ.values() for key in keys), *MARKS)

SPEAKERS = ("role", "from", "speaker", "author", "sender", "participant", "who")


def renamed(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """The row under our names.

    A mapped column leaves its old name and takes the new one's place; one that is mapped to nothing is not read.
    """
    columns = source.columns
    if columns:
        kept = {name: value for name, value in row.items() if name not in columns.values()}
        row = kept | {name: column and row.get(column) for name, column in columns.items()}
    if source.turn_keys or source.roles:
        row = {name: value if name == "tools" else _turns(value, source) for name, value in row.items()}
    return row


def check_mapping(source: Source) -> None:
    """Refuse keys of turns that nothing reads."""
    problems = [
        f"{source.path}: `turn_keys` maps the unknown '{shown(name)}'{meant(name, TURN_KEYS)}; expected some of "
        f"{listed(TURN_KEYS)}"
        for name in source.turn_keys
        if name not in TURN_KEYS
    ]
    if problems:
        raise UserError(*problems)


def turns_hint(rows: list[dict[str, Any]]) -> str:
    """What the recipe should say of a column that looks like turns under other names; nothing where none does."""
    for column in dict.fromkeys(name for row in rows for name in row):
        turns = [turn for row in rows for turn in _objects(row.get(column))]
        keys = list(dict.fromkeys(key for turn in turns for key in turn))
        words = {key: [turn[key] for turn in turns if isinstance(turn.get(key), str)] for key in keys}
        words = {key: texts for key, texts in words.items() if len(texts) * 2 > len(turns)}
        if len(words) < 2 or column == "tools":
            continue
        role = min(words, key=lambda key: _speaks(key, words[key]))
        content = max((key for key in words if key != role), key=lambda key: mean(map(len, words[key])))
        known = (role, content) in (("role", "content"), ("from", "value"))
        turn_keys = "" if known else f", turn_keys: {{role: {in_yaml(role)}, content: {in_yaml(content)}}}"
        mapped = f"columns: {{messages: {in_yaml(column)}}}{turn_keys}"
        return f"; `{shown(column)}` looks like turns with {listed([role, content])}: `{mapped}`"
    return ""


def _speaks(key: str, words: list[str]) -> tuple[bool, float, float]:
    """How little the values of a key look like names of who speaks: by its name, then few and short ones."""
    named = key.lower() in SPEAKERS or all(word.lower() in ROLES for word in words)
    return not named, len(set(words)) / len(words), mean(map(len, words))


def _turns(value: Any, source: Source) -> Any:
    """The same with the keys and roles of every turn in it under our names."""
    if isinstance(value, str) and (turns := list(_objects(value))):
        spoken = {"role", "from", source.turn_keys.get("role")}
        value = turns if any(spoken & turn.keys() for turn in turns) else value
    if isinstance(value, list):
        return [_turns(item, source) for item in value] if any(isinstance(v, list | dict) for v in value) else value
    if not isinstance(value, dict):
        return value
    theirs = {ours: key for ours, key in source.turn_keys.items() if key in value}
    turn = {key: said for key, said in value.items() if key not in theirs.values()}
    turn |= {ours: value[key] for ours, key in theirs.items()}
    for key in ("role", "from"):
        if isinstance(turn.get(key), str) and turn[key] in source.roles:
            turn[key] = source.roles[turn[key]]
    return turn


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects of a list, or of the JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))
