"""Several stages as one: their inputs named after earlier results, what is finished and unchanged left alone.

    python -m align.pipeline recipes/ppo_vs_dpo.yaml [key.path=value ...] [--dry-run] [--fresh]

1. Lay every stage's recipe together and check all of them before the first one starts.
2. Start each stage whose inputs are there, as many at once as the machine has room for: from the beginning, from its
   newest checkpoint, over again where what it was made of has changed, or not at all.
3. Note what each was made of and what it came to, so that the same command goes on after any end.

What a stage was made of is known by content: its resolved recipe, the files it reads, results of earlier stages among
them, and the version of align. Left out on purpose: several machines at once, and stages other than those of align.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from rich.console import Console

from align.recipe.document import Document
from align.recipe.errors import UserError
from align.recipe.help import recipe_help
from align.recipe.load import dump_recipe, load_recipe
from align.recipe.locks import claimed
from align.recipe.paths import Location, expanded
from align.recipe.schema import PositiveInt, Section
from align.tools.pipeline.board import Board
from align.tools.pipeline.jobs import FORKS, Job, Launcher, ask_to_stop, devices
from align.tools.pipeline.records import Records
from align.tools.pipeline.stage import Stage
from align.tools.pipeline.stages import stages_of
from align.training.borders.border import Parser, border, shows
from align.training.borders.stops import signals
from align.training.runs.durable import write_atomic
from align.training.runs.removal import is_written, run_recipe

LAST_LINES = 12  # of a stage that failed
OWN = "pipeline.yaml"  # marks a folder as a pipeline's


class Accelerate(Section):
    """How `accelerate launch` starts the stages that train. `accelerate: null` starts each as one plain process
    instead, some ten seconds faster."""

    config: Location | None = None
    """A file that `accelerate config` has made. Default: the user's own, if there is one."""
    processes: PositiveInt | None = None
    """Processes a stage. Default: as the config has it."""


Scalar = str | int | float | bool | None


class Keys(Section):
    """A stage: the keys of its own recipe, and these."""

    model_config = ConfigDict(extra="allow")

    stage: str | None = None
    """prepare, sft, reward, dpo, ppo, grpo, distill, classify, evaluate or compare. Default: that of `recipe`."""
    recipe: Location | None = None
    """A recipe to start from, beside the pipeline's file. What is shared is laid over it, then the stage's own keys."""
    sweep: dict[str, Annotated[list[Scalar], Field(min_length=1)]] = Field(default_factory=dict)
    """Key -> values: one stage for each combination, such as `dpo[beta=0.1,seed=2]`."""
    each: str | None = None
    """The name of a sweep: one stage for each of its points, in which `${that name}` is the point's result."""


class Recipe(Section):
    """A pipeline of stages."""

    stage: Literal["pipeline"]
    """This tool."""
    run: Location
    """The output folder; each stage's run is a folder in it, unless the stage has a `run` of its own."""
    accelerate: Accelerate | None = Field(default_factory=Accelerate)
    jobs: PositiveInt | Literal["auto"] = "auto"
    """Stages that may run at once. `auto`: one on a CPU, else the number of GPUs over the processes a stage takes."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Sections of every stage that knows them; the stage's own keys win."""
    stages: Annotated[dict[str, Keys], Field(min_length=1)]
    """Name -> stage. `${name}` is the result of the stage of that name."""


class Pipeline:
    """The stages of one recipe, and what has become of them."""

    def __init__(self, recipe: Recipe, stages: list[Stage], console: Console, fresh: bool) -> None:
        self.recipe, self.stages, self.fresh = recipe, stages, fresh
        self.folder, self.records = Path(recipe.run), Records(Path(recipe.run))
        accelerate = recipe.accelerate.model_dump() if recipe.accelerate else None
        self.launcher = Launcher(accelerate, recipe.jobs, devices())
        self.states = {stage.name: "waiting" for stage in stages}
        self.jobs: list[Job] = []
        self.board = Board(console, stages, self.states)

    def check(self) -> None:
        """Raise UserError if a folder holds something that is not ours. Writes nothing."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run: {folder} is a file; name another folder")
        inside = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
        if inside and not is_written(folder / OWN):
            what = f"no {OWN} that a pipeline wrote"
            raise UserError(f"run: {folder} holds files but no pipeline ({what}); name another folder")
        config = self.recipe.accelerate and self.recipe.accelerate.config
        if config and not Path(config).is_file():
            raise UserError(
                f"accelerate.config: {config}: no such file; accelerate config --config_file FILE makes one"
            )
        if foreign := [*filter(None, map(self.records.foreign, self.stages))]:
            raise UserError(*foreign)

    def preview(self) -> None:
        """Say what a run would do, and with which recipes."""
        self.check()
        say, moving = self.board.say, set[str]()
        say(f"{len(self.stages)} stages, {self.launcher.room} at a time:")
        for stage in self.stages:
            if waits := [name for name in stage.after if name in moving]:
                action, why = "start", f"after {', '.join(waits)}"
                if self.records[stage]:
                    action, why = "start or skip", f"start over only if the result of {', '.join(waits)} is another"
            else:
                action, why = self.records.verdict(stage, self.fresh)
            if action != "skip":
                moving.add(stage.name)
            say(f"  {stage.name}: {action} ({why})")
        for stage in self.stages:
            say(f"\n# {stage.name}: {' '.join(self.launcher.command(stage, self._file(stage), False))}")
            say(dump_recipe(stage.recipe).rstrip())

    def run(self) -> int:
        """Bring every stage to its end that can come to one; the exit status."""
        with claimed(self.folder, "another pipeline is at work in"):
            self.check()
            self._open()
            return self._run()

    def _run(self) -> int:
        FORKS.set_forkserver_preload(sorted({f"align.{stage.kind}" for stage in self.stages}))
        try:
            with signals() as asked, self.board:
                while self._step(bool(asked)):
                    time.sleep(0.1)
        except BaseException:  # such as a second Ctrl-C: nothing runs on behind it
            for job in self.jobs:
                job.asked.clear()
                job.stop()
            raise
        return self._conclude(bool(asked))

    def _open(self) -> None:
        write_atomic(self.folder / OWN, run_recipe(self.recipe))
        for stage in self.stages:  # a pipeline that was killed leaves its stages running
            record, asked = self.records[stage], set[int]()
            if record and not record.result and ask_to_stop(self._log(stage), asked):
                self.board.say(f"{stage.name}: still runs, without its pipeline; it is asked to save and to stop")
                while ask_to_stop(self._log(stage), asked):
                    time.sleep(0.2)

    def _step(self, stop: bool) -> bool:
        """Look after what is running, start what can be; whether there is more to do."""
        for job in list(self.jobs):
            if stop:
                job.stop()
            if (status := job.over()) is not None:
                self.jobs.remove(job)
                self._ended(job, status, stop)
        for stage in self.stages if not stop else ():
            before = {self.states[name] for name in stage.after}
            if self.states[stage.name] != "waiting":
                continue
            if before & {"failed", "held back"}:
                self.states[stage.name] = "held back"
            elif before <= {"finished", "skipped"} and len(self.jobs) < self.launcher.room:
                self._begin(stage)
        self.board.show(self.jobs)
        return bool(self.jobs) or (not stop and "waiting" in self.states.values())

    def _begin(self, stage: Stage) -> None:
        action, why = self.records.verdict(stage, self.fresh)
        if action == "skip":
            self.states[stage.name] = "skipped"
            self.board.say(f"{stage.name}: {why}")
            return
        write_atomic(self._file(stage), dump_recipe(stage.recipe))
        self.records.started(stage, over=action == "start over")
        taken = {job.slot for job in self.jobs}
        slot = next(slot for slot in range(self.launcher.room) if slot not in taken)
        command = self.launcher.command(stage, self._file(stage), action == "start over", slot)
        self.board.say(f"{stage.name}: {action} ({why}); {self._log(stage)}")
        self.jobs.append(Job(stage, command, self._log(stage), self.launcher.environment(slot), slot))
        self.states[stage.name] = "running"

    def _ended(self, job: Job, status: int, stop: bool) -> None:
        stage, say = job.stage, self.board.say
        self.board.seconds[stage.name] = job.seconds
        if status == 0 and self.records.has_ended(stage):
            self.records.finished(stage, job.seconds)
            self.states[stage.name] = "finished"
            say(f"{stage.name}: finished in {job.seconds:.0f} s")
        elif stop:
            self.states[stage.name] = "stopped"
            at = " at step {} of {}".format(*progress) if (progress := job.progress()) else ""
            say(f"{stage.name}: stopped{at}")
        else:
            self.states[stage.name] = "failed"
            lines = job.told().rstrip().splitlines()[-LAST_LINES:]
            say("\n".join(f"  {line}" for line in lines))
            what = f"failed with status {status}" if status else "ended before its end"
            say(f"{stage.where}: {stage.name} {what}; all that it said is in {job.log}")

    def _conclude(self, stopped: bool) -> int:
        found = list(self.states.values())
        failed = [name for name, state in self.states.items() if state == "failed"]
        held = [name for name, state in self.states.items() if state == "held back"]
        if failed:
            waits = f"; held back: {', '.join(held)}" if held else ""
            self.board.say(f"failed: {', '.join(failed)}{waits}. Run the same command again when it is mended")
            return 2
        if stopped and {"waiting", "stopped"} & {*found}:
            self.board.say("stopped by a signal; run the same command again to go on from there")
        elif set(found) == {"skipped"}:
            self.board.say(f"all {len(found)} stages are finished and unchanged: nothing to do (--fresh starts over)")
        else:
            report = self.stages[-1].folder / "report.html"
            self.board.say(f"done: all {len(found)} stages are finished; the last one's report: {report}")
        return 0

    def _file(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.slug}.yaml"

    def _log(self, stage: Stage) -> Path:
        return self.folder / "logs" / f"{stage.slug}.log"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(
        "python -m align.pipeline",
        description=Recipe.__doc__,
        epilog=_keys(),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file with the keys below")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="set a key over the file's value")
    parser.add_argument("--dry-run", action="store_true", help="check all, print the plan and every recipe, and stop")
    parser.add_argument("--fresh", action="store_true", help="start every stage over")
    given = sys.argv[1:] if argv is None else argv
    with border("let fewer stages run at once (jobs)", result=shows(given)):
        words = parser.parse_intermixed_args(given)
        recipe, document = _read(expanded(words.recipe), words.overrides)
        pipeline = Pipeline(recipe, stages_of(document, Path(recipe.run)), Console(), words.fresh)
        if status := pipeline.preview() if words.dry_run else pipeline.run():
            raise SystemExit(status)


def _read(path: str, overrides: Sequence[str]) -> tuple[Recipe, Document]:
    """The recipe, typed, and as it was written."""
    try:
        recipe = load_recipe(path, overrides, Recipe)
    except UserError as error:
        hint = 'within { } and [ ], a reference stands in quotes: "${name}"'
        raise UserError(*(f"{p}; {hint}" if "but got '{'" in p else p for p in error.problems)) from None
    document = Document(Path(path))
    for number, override in enumerate(overrides):
        document.override(number, override)
    return recipe, document


def _keys() -> str:
    """What a recipe may hold."""
    top, stage = (recipe_help(kind, "").partition("At the top level:\n")[2] for kind in (Recipe, Keys))
    return f"At the top level:\n{top}\nOf a stage, besides the keys of its own recipe:\n{stage}"


if __name__ == "__main__":
    main()
