"""From a recipe file and overrides to a typed recipe, or to every problem with its line; and back to YAML.

pydantic checks; what stands here finds the line of each of its errors and says it in plain words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import ValidationError

from align.recipe.document import FLOAT, Document, Keys, Problem, dotted, is_text_only_in_quotes, spoken
from align.recipe.errors import UserError, brief
from align.recipe.help import (
    arms,
    choices,
    is_section,
    json_schema,
    recipe_help,
    sections,
    split,
    usage,
    words,
)
from align.recipe.paths import expanded
from align.recipe.schema import BaseRecipe

FLAGS = ("--fresh", "--show", "--extend")  # in the order of Command's fields
MOST = 100  # problems that are told of one recipe; the rest are counted
STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "distill", "classify")


class Command(NamedTuple):
    """What a stage's command line asks for."""

    recipe: BaseRecipe
    path: Path
    fresh: bool  # start at step 0, whatever checkpoints there are
    show: bool  # print rendered examples instead of training
    extend: bool  # go on with the run that is there to a later end


def parse_command(argv: Sequence[str], recipe_type: type[BaseRecipe], program: str) -> Command:
    """Read `RECIPE [key.path=value ...] [--fresh] [--extend] [--show]` in any order; `--help` and `--schema` exit.

    `argv` is without the program's name; `program` is such as "align.sft". Raises UserError.
    """
    if "--help" in argv or "-h" in argv:
        print(recipe_help(recipe_type, program), end="")
        raise SystemExit(0)
    if "--schema" in argv:
        print(json_schema(recipe_type), end="")
        raise SystemExit(0)
    flags = [word for word in argv if word.startswith("-")]
    overrides = [word for word in argv if not word.startswith("-") and _is_override(word)]
    paths = [word for word in argv if not word.startswith("-") and not _is_override(word)]
    problems = [_unknown_flag(flag) for flag in flags if flag not in FLAGS]
    problems += [f"{brief(word)!r} is one argument too many; an override is key.path=value" for word in paths[1:]]
    if not paths:
        problems.append("no recipe is named")
    if {"--fresh", "--extend"} <= {*flags}:
        problems.append("--fresh starts over and --extend goes on: give one of them")
    if problems:
        raise UserError(*problems, f"usage: {usage(program)}")
    path = expanded(paths[0])
    recipe = load_recipe(path, overrides, recipe_type)
    return Command(recipe, Path(path), *(flag in flags for flag in FLAGS))


def load_recipe(path: str | Path, overrides: Sequence[str], recipe_type: type[BaseRecipe]) -> BaseRecipe:
    """The recipe at `path` with `key.path=value` overrides set on top.

    Raises UserError with every problem, each as `file:line: fault; remedy` or `override '…': fault; remedy`.
    """
    document = Document(Path(path))
    for number, override in enumerate(overrides):
        document.override(number, override)
    stage, here = document.values.get("stage"), document.place(("stage",)).where
    if stage in STAGES and stage not in choices(recipe_type.model_fields["stage"].annotation):
        run = f"accelerate launch -q -m align.{stage} {path}"
        raise UserError(f"{here}: this is a recipe of stage {stage!r}; run it with: {run}")
    recipe, problems = None, document.problems
    try:
        recipe = recipe_type.model_validate(document.values)
    except ValidationError as error:
        problems = problems + problems_of(error, recipe_type, document)
    if problems:
        raise UserError(*dict.fromkeys(text for _, text in sorted(problems, key=lambda p: p.order)))
    assert recipe is not None
    return recipe


def dump_recipe(recipe: BaseRecipe) -> str:
    """The resolved recipe, defaults included, as YAML that loads back equal."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, indent=2)


class _Dumper(yaml.SafeDumper):
    """Quotes what any YAML reader, or ours, would take for something else than text; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        odd = re.search("[\x85\u2028\u2029\ufeff]", text)  # line breaks to some readers: written as escapes
        style = '"' if odd else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def problems_of(error: ValidationError, recipe_type: type[BaseRecipe], document: Document) -> list[Problem]:
    """pydantic's errors as ours: one for each value, however many arms of a union refused it; the first in the file,
    where there are very many."""
    found = {}
    for fault in error.errors(include_url=False):
        keys, kind = _follow(recipe_type, fault["loc"])
        found.setdefault(keys, (fault, kind))
    around = {keys[:depth] for keys in found for depth in range(len(keys))}
    at_fault = []
    for keys, (fault, kind) in found.items():
        if len(arms(kind)) > 1 and keys in around:
            continue  # one arm of the union fits but for a value inside it: only that value is at fault
        at_fault.append((document.place(keys[:-1] if fault["type"] == "missing" else keys), fault, keys, kind))
    at_fault.sort(key=lambda found: found[0].order)
    told = [
        Problem(place.order, f"{place.where}: {_say(fault, keys, kind, recipe_type, document)}")
        for place, fault, keys, kind in at_fault[:MOST]
    ]
    if more := len(at_fault) - len(told):
        place = at_fault[MOST][0]
        told.append(Problem(place.order, f"{place.where}: {more:,} more problems from here on"))
    return told


def _follow(kind: Any, loc: Keys) -> tuple[Keys, Any]:
    """pydantic's location as keys of the recipe, and the type wanted there.

    In a union, pydantic's location has one name more: that of the arm it tried.
    """
    keys: Keys = ()
    for number, key in enumerate(loc):
        options = arms(kind)
        if len(options) > 1:
            if number + 1 < len(loc):
                kind = next((arm for arm in options if _name(arm) in str(key)), Any)
            continue
        keys = (*keys, key)
        kind = _below(options[0], key)
    return keys, kind


def _name(kind: Any) -> str:
    bare, _ = split(kind)
    return getattr(get_origin(bare) or bare, "__name__", "")


def _below(kind: Any, key: str | int) -> Any:
    """The type of what stands at `key` in a section, list or mapping of this type."""
    bare, _ = split(kind)
    if is_section(bare):
        return bare.model_fields[key].rebuild_annotation() if key in bare.model_fields else Any
    return get_args(bare)[-1] if get_args(bare) else Any


def _say(fault: dict, keys: Keys, kind: Any, recipe_type: type[BaseRecipe], document: Document) -> str:
    name, section = dotted(keys), keys[:-1]
    match fault["type"]:
        case "missing":
            return f"missing key {keys[-1]!r} in {dotted(section)}; it takes {words(kind)}"
        case "extra_forbidden":
            return f"unknown key {brief(keys[-1])!r} in {dotted(section)}; {_meant(keys[-1], section, recipe_type)}"
        case "value_error":
            return f"{name}: {fault['ctx']['error']}" if keys else str(fault["ctx"]["error"])
    value, written = fault["input"], document.place(keys).written
    return f"{name}: expected {words(kind)}, found {_found(value, written)}{_remedy(value, written, kind)}"


def _meant(key: str, section: Keys, recipe_type: type[BaseRecipe]) -> str:
    here = ".".join("0" if isinstance(k, int) else k for k in section)
    known = {name: kind.model_fields for name, kind in sections(recipe_type)}
    if close := get_close_matches(key, known[here], 1, cutoff=0.7):
        return f"did you mean {close[0]!r}?"
    if homes := [f"`{name}`" if name else "the top level" for name, fields in known.items() if key in fields]:
        return f"it belongs in {' or '.join(homes)}"
    return f"its keys are {', '.join(known[here])}"


def _found(value: Any, written: str) -> str:
    if isinstance(value, bool) and written.lower() not in ("true", "false"):
        return f"{written}, which YAML reads as {spoken(value)}"
    return spoken(value)


def _remedy(value: Any, written: str, kind: Any) -> str:
    options = arms(kind)
    takes_text = any(split(arm)[0] is str for arm in options)
    if isinstance(value, str):
        close = get_close_matches(value, [c for c in choices(kind) if isinstance(c, str)], 1)
        if close:
            return f"; did you mean {close[0]!r}?"
        if not takes_text and not written and is_text_only_in_quotes(value):
            return "; drop the quotes"
    elif takes_text and written:
        return f"; put it in quotes: '{written}'"
    if isinstance(value, str | int | float) and any(_name(arm) == "list" for arm in options):
        return f"; write it as a list: [{written or repr(value)}]"
    return ""


def _is_override(word: str) -> bool:
    return "=" in word and "/" not in word.partition("=")[0]


def _unknown_flag(flag: str) -> str:
    bare = flag.lstrip("-")
    if "." in bare or "=" in bare:
        wanted = brief(bare) if "=" in bare else f"{bare}=value"
        return f"unknown option {brief(flag)!r}; an override is written without dashes: {wanted}"
    close = get_close_matches(flag, (*FLAGS, "--schema", "--help"), 1)
    return f"unknown option {brief(flag)!r}" + (f"; did you mean {close[0]!r}?" if close else "")
