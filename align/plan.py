"""What a recipe will take, before anything is loaded: memory, work, traffic and time.

    python -m align.plan recipes/ppo.yaml [key.path=value ...] [--device h200] [--processes 8] [--hosts 1]
        [--tokens N] [--json]

It reads the model's config alone and makes it without weights. It says how much memory each part takes on a device,
whether the run fits, what to change if it does not, and the largest row and rollout that fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from align.recipe.document import Document
from align.recipe.errors import UserError
from align.recipe.load import STAGES, load_recipe
from align.recipe.paths import expanded
from align.recipe.schema import BaseRecipe
from align.tools.pipeline.stage import recipe_type
from align.tools.plan.advice import advice, largest_rollout, largest_row
from align.tools.plan.report import Report, record, told
from align.training.borders.border import Parser, border
from align.training.planning.devices import CARDS, device
from align.training.planning.memory import memory
from align.training.planning.parts import setting
from align.training.planning.work import work

MEMORY = "close other programs; a plan itself takes few hundred MB"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="align.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="a recipe of any stage")
    parser.add_argument("overrides", nargs="*", help="key.path=value, as for the stage itself")
    parser.add_argument("--device", default="cpu", help=f"{', '.join(CARDS)}, cpu (this machine), or a size: 24GB")
    parser.add_argument("--processes", type=int, default=1, help="devices in all")
    parser.add_argument("--hosts", type=int, default=1, help="machines that they stand in")
    parser.add_argument("--tokens", type=int, help="of an example, or of a prompt; default: data.max_length")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_intermixed_args(list(argv))
    for name in ("processes", "hosts", "tokens"):
        if (number := getattr(asked, name)) is not None and number < 1:
            raise UserError(f"--{name}: expected a number of 1 or more, found {number}")
    if asked.processes % asked.hosts:
        raise UserError(f"--processes {asked.processes}: they cannot be shared out over {asked.hosts} hosts")
    return asked


def read(path: str, overrides: Sequence[str]) -> BaseRecipe:
    """The recipe, of whatever stage it is."""
    document = Document(Path(expanded(path)))
    stage = document.values.get("stage")
    if stage not in STAGES:
        where = document.place(("stage",)).where
        raise UserError(*[p.text for p in document.problems], f"{where}: a plan is of a stage: {', '.join(STAGES)}")
    return load_recipe(expanded(path), overrides, recipe_type(stage))


def planned(asked: argparse.Namespace) -> Report:
    """The whole plan."""
    recipe = read(asked.recipe, asked.overrides)
    if asked.tokens and asked.tokens > recipe.data.max_length:
        raise UserError(f"--tokens {asked.tokens}: no example is longer than data.max_length={recipe.data.max_length}")
    at = setting(recipe, device(asked.device, asked.hosts), asked.processes)
    plan = memory(at, asked.tokens)
    changes, mended = advice(at, plan, asked.tokens)
    return Report(
        at=at,
        hosts=asked.hosts,
        plan=plan,
        work=work(at, plan, asked.hosts),
        changes=changes,
        mended=mended,
        largest_row=largest_row(at),
        largest_rollout=largest_rollout(at, asked.tokens) if plan.load.episodes else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    with border(MEMORY, result=True):
        asked = arguments(sys.argv[1:] if argv is None else argv)
        report = planned(asked)
        print(json.dumps(record(report), indent=1) if asked.json else "\n".join(told(report)))


if __name__ == "__main__":
    main()
