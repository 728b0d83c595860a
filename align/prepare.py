"""Prepare a set: raw rows of any format in, a clean, mixed, versioned set out, with what was done to it.

    python -m align.prepare recipes/data.yaml [key.path=value ...] [--fresh] [--dry-run]

1. Validate: every record becomes a canonical row, or a fault with its file and line.
2. Look at each row by itself: filters, decontamination, privacy.
3. Look at all rows: scores by models, duplicates, the split, the mixture.
4. Write shards of each side, a ledger of what became of rows, and a manifest with the hashes of all that went in and
   came out.

The set depends on the recipe, its seed and the sources alone: one worker, four, or Ray on several machines write the
same bytes. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from transformers.utils import logging

from align.data.mixture import counting
from align.data.preparing.output import write
from align.data.preparing.pipeline import Outcome, check_valid, decided, invalid, reported
from align.data.preparing.reading import ALL
from align.data.preparing.steps import Plan, Tools
from align.data.preparing.tokens import Tokens
from align.models.demo import cache_folder
from align.recipe.errors import UserError, printable
from align.recipe.help import json_schema, recipe_help
from align.recipe.load import load_recipe
from align.recipe.locks import claimed
from align.recipe.paths import Location, expanded
from align.recipe.preparing.mixing import Mix
from align.recipe.preparing.output import Output
from align.recipe.preparing.preparation import Preparation
from align.recipe.schema import PositiveInt, Section, Source
from align.tools.preparing.cards import write_cards
from align.tools.preparing.engines import engine_of
from align.tools.preparing.folder import Folder, key_of, versions
from align.tools.preparing.inputs import check_apart, inputs_of, tokenizer_file
from align.tools.preparing.names import names_of
from align.tools.preparing.scores import scorers
from align.tools.preparing.told import told
from align.training.borders.border import Parser, border, shows
from align.training.borders.foreign import foreign
from align.training.borders.stops import Signals, Stopped

MEMORY = "give fewer `workers`, or a machine with more memory"


class Recipe(Section):
    """What goes into a set, and what comes out."""

    stage: Literal["prepare"]
    """This tool."""
    run: Location
    """The output folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the split, the mixture and the hashes of near-duplicates."""
    sources: list[Source] = Field(min_length=1)
    """The raw rows, in the order that decides which of two equal rows is the first."""
    invalid: Literal["error", "drop"] = "error"
    """What happens to a record that is no row of its format. Drops go to ledger.jsonl."""
    prepare: Preparation = Field(default_factory=Preparation)
    mix: Mix | None = None
    tokenizer: Location | None = None
    """What counts tokens, for lengths and shares: a base checkpoint as in a stage's `model.base`, or a tokenizer.json.
    Default: words are counted."""
    output: Output = Field(default_factory=Output)
    card: bool = True
    """Write the data card, `card.html` and `card.json`. It takes about as long as reading: leave it out of very large
    sets."""
    dry_run: bool = False
    """Only count what each step would do; `--dry-run` sets it."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes; `auto` is one a core. It changes nothing in the set."""
    engine: Literal["local", "ray"] = "local"
    """`ray` runs the same steps on the machines of a Ray cluster. Needs `pip install 'align[prepare-ray]'`."""


def prepare(recipe: Recipe, fresh: bool, console: Console) -> None:
    """From sources to a set in its place."""
    folder, say = Folder(recipe.run), _Say(console)
    check_apart(recipe)
    with claimed(folder.path), _writing_to(folder.path):
        folder.check()
        if folder.interrupted:
            folder.publish()
        about = {"recipe": _identity(recipe), "inputs": inputs_of(recipe), "versions": versions()}
        key, there = key_of(about), folder.manifest()
        if there and there["key"] == key and not fresh:
            if (lacking := folder.lacking(there)) is None:
                say(f"{folder.path} holds this set already: nothing to do (--fresh makes it again)")
                return
            say(f"{folder.path / lacking} is not as it was written; the set is made again")
        if there and there["key"] != key and not fresh:
            raise UserError(
                f"run: {folder.path} holds a set of another recipe, other sources or another version; name another "
                "folder, or replace it with --fresh"
            )
        if folder.begin(key):
            say("the recipe or a source has changed since the run that was broken off; it starts over")
        with counting(console) as tell:
            outcome = _outcome(recipe, folder.beside, tell)
            files = write(
                outcome, _plan(recipe), recipe.output, folder.beside, engine_of(recipe.engine, recipe.workers), tell
            )
        report = reported(outcome)
        manifest = about | {
            "key": key,
            "records": sum(about.get("records", 0) for about in outcome.spool.batches),
            "invalid": invalid(outcome)[0],
            "steps": report,
            "cut": files.cut,
            "lost": files.lost,
            "sides": files.sides,
        }
        if recipe.card:
            write_cards(folder.beside / "set", _plan(recipe), outcome, report, files, recipe)
        outcome.spool.close()
        folder.publish(recipe, manifest)
    for line in told(outcome, report, files):
        say(line)
    say(f"done: {folder.path}")


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """What the system says of a full disk names no folder."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise


def dry_run(recipe: Recipe, console: Console) -> None:
    """Count what each step would do, and write nothing that stays."""
    with tempfile.TemporaryDirectory(dir=_scratch()) as beside, counting(console) as tell:
        outcome = _outcome(recipe, Path(beside), tell)
        lines = told(outcome, reported(outcome), None)
        outcome.spool.close()
    for line in lines:
        _Say(console)(line)


def _outcome(recipe: Recipe, beside: Path, tell: Any) -> Outcome:
    outcome = decided(
        _plan(recipe), beside, engine_of(recipe.engine, recipe.workers), scorers(recipe.prepare.filter), tell
    )
    check_valid(outcome, recipe.invalid)
    if not outcome.alive.any():
        raise UserError("sources: no row is left", *told(outcome, reported(outcome), None)[:20])
    return outcome


def _plan(recipe: Recipe) -> Plan:
    output, tokenizer = recipe.output, recipe.tokenizer and tokenizer_file(recipe.tokenizer)
    tools = Tools(foreign, names_of, partial(Tokens, tokenizer) if tokenizer else None)
    return Plan(
        recipe.sources, ALL, recipe.prepare, recipe.seed, tools, output.keep, output.split, recipe.mix, recipe.card
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides on the set."""
    return recipe.model_dump(exclude={"run", "workers", "engine", "dry_run"})


def _scratch() -> Path:
    folder = cache_folder() / "preparing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Say:
    """Lines on the screen, with control characters spelt out."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, line: str) -> None:
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given = sys.argv[1:] if argv is None else argv
    with border(MEMORY, result=shows(given)):
        if "--schema" in given:
            print(json_schema(Recipe), end="")
            return
        parser = Parser(
            "python -m align.prepare",
            description=__doc__.partition("\n")[0],
            epilog=recipe_help(Recipe, "").partition("At the top level:\n")[2],
            formatter_class=argparse.RawTextHelpFormatter,
        )
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file with the keys below")
        parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="set a key over the file's value")
        parser.add_argument(
            "--fresh", action="store_true", help="make the set again, in place of the one that is there"
        )
        parser.add_argument("--dry-run", action="store_true", help="only count what each step would do")
        parser.add_argument("--schema", action="store_true", help="print the recipe's JSON schema, and stop")
        words = parser.parse_intermixed_args(given)
        recipe = load_recipe(expanded(words.recipe), words.overrides, Recipe)
        console = Console()
        try:
            with Signals():
                if recipe.dry_run or words.dry_run:
                    dry_run(recipe, console)
                else:
                    prepare(recipe, words.fresh, console)
        except Stopped:
            _Say(console)("stopped by a signal; run the same command again to resume")


if __name__ == "__main__":
    main()
