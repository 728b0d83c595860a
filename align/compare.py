"""Compare runs that started from one model: which is better, at what KL, how surely, and at what cost.

    python -m align.compare RECIPE [key.path=value …] [--fresh]

Reads folders that `align.evaluate` wrote over the same prompts; writes `report.html`, `compare.md`, `costs.json` and
`compare.json`. The statistics are in `tools/comparison/statistics.py`. What is shown follows Rafailov et al. 2023 (the
reward-KL frontier, arXiv 2305.18290) and Gao et al. 2022 (over-optimisation, arXiv 2210.10760). Left out on purpose: a
ranking of all runs in one number.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from rich.console import Console

from align.recipe.errors import UserError, printable
from align.recipe.load import dump_recipe, load_recipe, parse_command
from align.recipe.locks import claimed
from align.recipe.paths import Location
from align.recipe.schema import PositiveInt, Section
from align.tools.comparison.evaluated import Evaluated, check_alike, read_run
from align.tools.comparison.figures import compare
from align.tools.comparison.page import costs, figures, markdown, page
from align.tools.comparison.summary import cost, headlines, summary
from align.training.bootstrap import Draws
from align.training.borders.border import border, shows
from align.training.runs.durable import write_atomic
from align.training.runs.removal import is_written, run_recipe


class Source(Section):
    """An evaluated run, or a sweep of them."""

    path: Location | list[Location]
    """Run folder of an `align.evaluate`, or several of one sweep."""
    name: str | None = None
    """What the run is called (default: as its evaluation is). Of a single folder alone."""
    group: str | None = None
    """The sweep that it belongs to, such as dpo or ppo; groups are what is compared. Default: the stage that trained
    it."""

    @model_validator(mode="after")
    def _one_name(self) -> Source:
        if self.name is not None and isinstance(self.path, list):
            raise ValueError("a name is of one folder: give each its own entry, or leave `name` out")
        if not self.paths or not all(self.paths):
            raise ValueError("`path` is empty: name the folder of an evaluation")
        return self

    @property
    def paths(self) -> list[str]:
        """The folders."""
        return [self.path] if isinstance(self.path, str) else self.path


class Compare(Section):
    """Which runs, and by which score."""

    runs: list[Source] = Field(min_length=1)
    """The runs."""
    baseline: Location | None = None
    """Run folder of the evaluation of the model that all runs started from (usually the SFT result), with several
    samples a prompt for best-of-n. Default: without it."""
    score: str = "gold"
    """The score that decides: a name in the evaluations' `scores`."""
    proxy: str | None = None
    """The score that was trained on, to show over-optimisation (Gao et al. 2022, arXiv 2210.10760). Default: not
    shown."""
    resamples: Annotated[int, Field(ge=200)] = 2000
    """Bootstrap resamples behind each interval."""
    best_of: list[PositiveInt] = Field(default_factory=lambda: [1, 2, 4, 8])
    """The n of best-of-n; those above the baseline's samples a prompt are left out."""

    @model_validator(mode="after")
    def _two_scores(self) -> Compare:
        if self.proxy == self.score:
            raise ValueError("`proxy` is the same as `score`: leave it out")
        return self


class Recipe(Section):
    """A comparison of evaluated runs."""

    stage: Literal["compare"]
    """This tool."""
    run: Location
    """The folder for the report."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the bootstrap's resamples."""
    compare: Compare


def read(section: Compare) -> tuple[list[Evaluated], int | None]:
    """All runs, the baseline first, and its number. Raises UserError with every problem of every folder."""
    wanted = [(path, source.name, source.group) for source in section.runs for path in source.paths]
    start = None if section.baseline is None else Path(section.baseline).resolve()
    if start and start not in [Path(path).resolve() for path, _, _ in wanted]:
        wanted = [(section.baseline, None, None), *wanted]
    if len(wanted) < 2:
        raise UserError("compare.runs: there is one run; name two or more, or one and a baseline")
    times = Counter((Path(path).resolve(), name) for path, name, _ in wanted)
    if twice := [path for (path, _), n in times.items() if n > 1]:
        raise UserError(*(f"compare.runs: {path} is there twice; leave one out, or give each a name" for path in twice))
    runs, problems = [], []
    for path, name, group in wanted:
        try:
            runs.append(read_run(Path(path), name, group))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    check_alike(runs, [*filter(None, (section.score, section.proxy))])
    return runs, next((i for i, run in enumerate(runs) if start and run.path.resolve() == start), None)


def check_folder(recipe: Recipe, fresh: bool) -> None:
    """Raise UserError if the folder holds something that is not this comparison. Writes nothing."""
    folder = Path(recipe.run)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run: {folder} is a file; name another folder")
    if not folder.is_dir() or all(path.name.startswith(".writing-") for path in folder.iterdir()):
        return
    if not is_written(folder / "recipe.yaml"):
        what = "no recipe.yaml that a comparison wrote"
        raise UserError(f"run: {folder} holds files but no comparison ({what}); name another folder")
    try:
        other = load_recipe(folder / "recipe.yaml", [], Recipe)
    except UserError as error:
        raise UserError(f"run: {folder} holds files but no comparison ({error.problems[0]}); name another") from None
    if not fresh and other.model_dump(exclude={"run"}) != recipe.model_dump(exclude={"run"}):
        raise UserError(f"run: {folder} holds another comparison; name another folder, or replace it with --fresh")


def work(recipe: Recipe, fresh: bool, console: Console) -> None:
    """The tool, from recipe to report."""
    with claimed(Path(recipe.run)):
        check_folder(recipe, fresh)
        _write(recipe, console)


def _write(recipe: Recipe, console: Console) -> None:
    section, folder, text = recipe.compare, Path(recipe.run), dump_recipe(recipe)
    runs, baseline = read(section)
    draws = Draws(section.resamples, recipe.seed)
    result = compare(runs, baseline, section.score, section.proxy, section.best_of, draws)
    written = {
        "recipe.yaml": run_recipe(recipe),
        "report.html": page(result, runs, text),
        "compare.md": markdown(result),
        "costs.json": costs(result),
        "compare.json": figures(result),  # last: where it stands, the rest does too
    }
    for name, content in written.items():
        write_atomic(folder / name, content)
    for line in (*headlines(result), *summary(result), cost(result), f"{folder / 'report.html'} holds the report"):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = sys.argv[1:] if argv is None else argv
    with border("compare fewer runs at once", result=shows(words)):
        command = parse_command(words, Recipe, "align.compare")
        if command.show:
            raise UserError("--show: a comparison has no examples to show; leave it out")
        if command.extend:
            raise UserError("--extend: a comparison has no later end; leave it out")
        work(command.recipe, command.fresh, Console())


if __name__ == "__main__":
    main()
