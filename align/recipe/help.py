"""What a recipe may hold, from its types and docstrings: for people (`--help`) and editors (`--schema`)."""

from __future__ import annotations

import json
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

WIDTH = 100

OPTIONS = {
    "RECIPE": "a YAML file with the keys below; those that have a default may be left out",
    "key.path=value": "set a key over the file's value; list items go by index: data.train.0.path=my.jsonl",
    "--fresh": "start at step 0 even where the run folder holds a checkpoint to go on from",
    "--extend": "go on with a run that was planned shorter: train.epochs or train.steps may be larger than it was",
    "--show": "print some examples as the model will see them, the trained tokens marked, and stop",
    "--schema": "print the recipe's JSON schema, for editors, and stop",
    "--help": "print this and stop",
}


def usage(program: str) -> str:
    """The command line in one line."""
    return f"accelerate launch -q -m {program} RECIPE [key.path=value ...] [--fresh] [--extend] [--show]"


def recipe_help(recipe_type: type[BaseModel], program: str) -> str:
    """The whole `--help` text of a stage, such as `align.sft`, at most 100 columns wide."""
    lines = [f"usage: {usage(program)}", ""]
    about = (recipe_type.__doc__ or "").strip().partition("\n\n")[0]
    lines += [_filled(about), ""] if about else []
    lines += [
        textwrap.fill(text, WIDTH, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
        for name, text in OPTIONS.items()
    ]
    homes: dict[type[BaseModel], str] = {}
    for name, kind in sections(recipe_type):
        if kind in homes:
            lines += ["", f"{name}: the same keys as {homes[kind]}"]
            continue
        homes[kind] = name
        lines += ["", _filled(f"{name}: {kind.__doc__}" if name else "At the top level:")]
        for key, field in kind.model_fields.items():
            if not all(map(is_section, arms(field.annotation))):
                full = f"{name}.{key}".lstrip(".")
                lines += ["", _filled(f"{full}: {words(field.rebuild_annotation())}{_default(field)}", 2, 4)]
                lines += [_filled(field.description, 6, 6)] if field.description else []
    return "\n".join(lines) + "\n"


def _filled(text: str, first: int = 0, rest: int = 0) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=" " * first, subsequent_indent=" " * rest)


def json_schema(recipe_type: type[BaseModel]) -> str:
    """The recipe's JSON schema (draft 2020-12), descriptions included."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe_type.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def sections(kind: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A recipe's sections, the outer first, by dotted name: "" at the top, "data.train.0" for list items."""
    yield name, kind
    for key, field in kind.model_fields.items():
        for arm in arms(field.annotation):
            below = f"{name}.{key}".lstrip(".")
            if get_origin(arm) is list:
                below, (arm,) = f"{below}.0", get_args(arm)
            if is_section(arm):
                yield from sections(arm, below)


def arms(kind: Any) -> list[Any]:
    """The types that a union joins, without None, each with the union's constraints; one type is a union of itself."""
    bare, constraints = split(kind)
    if get_origin(bare) in (Union, types.UnionType):
        joined = [arm for arm in get_args(bare) if arm is not type(None)]
        return [Annotated[arm, *constraints] for arm in joined] if constraints else joined
    return [kind]


def is_section(kind: Any) -> bool:
    """Whether a type is a section of keys of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def choices(kind: Any) -> list[Any]:
    """The literal values that a type takes."""
    return [c for arm in arms(kind) if get_origin(split(arm)[0]) is Literal for c in get_args(split(arm)[0])]


def words(kind: Any) -> str:
    """A type in plain words: `int above 0 or "auto"` is "a whole number above 0 or 'auto'"."""
    said = [repr(choice) for choice in choices(kind)]
    said = [_arm(arm) for arm in arms(kind) if get_origin(split(arm)[0]) is not Literal] + said
    said += ["null"] if _nullable(kind) else []
    return " or ".join(filter(None, [", ".join(said[:-1]), said[-1]]))


def _arm(kind: Any) -> str:
    bare, constraints = split(kind)
    constraints = [c for c in constraints if not isinstance(c, AfterValidator)]  # it changes what is given
    said = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(bare, "any value")
    if is_section(bare):
        said = "a section"
    elif get_origin(bare) is list:
        said = f"a list (each item {words(get_args(bare)[0])})"
    elif get_origin(bare) is dict:
        value = get_args(bare)[1]
        said = "a section of names" + ("" if value is Any else f", each with {words(value)}")
    return " ".join([said, " and ".join(map(_limit, constraints))]).strip()


def _limit(constraint: Any) -> str:
    match constraint:
        case limits.Gt(bound):
            return f"above {bound:g}"
        case limits.Ge(bound):
            return f"at least {bound:g}"
        case limits.Lt(bound):
            return f"below {bound if isinstance(bound, int) else f'{bound:g}'}"
        case limits.Le(bound):
            return f"at most {bound:g}"
        case limits.MinLen(length):
            return f"of length {length} or more"
        case object(pattern=str(pattern)):
            return f"that matches {pattern}"
        case _:
            return f"({constraint})"


def split(kind: Any) -> tuple[Any, list[Any]]:
    """A type without its `Annotated`, and the constraints that stood there."""
    constraints = []
    while get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        for item in metadata:
            constraints += item.metadata if isinstance(item, FieldInfo) else [item]
    return kind, constraints


def _nullable(kind: Any) -> bool:
    return type(None) in get_args(split(kind)[0])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    default = field.get_default(call_default_factory=True)
    return f", default {default if isinstance(default, str) else json.dumps(default)}"
