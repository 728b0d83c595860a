"""A run's folder: whose it is, how far the run is, and never writing over another's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.recipe.engine import PLACES
from align.recipe.errors import UserError
from align.recipe.load import load_recipe
from align.recipe.records import parsed, read_lines, to_json
from align.recipe.schema import BaseRecipe
from align.training.best import patience_end
from align.training.meters import environment
from align.training.plan import Plan, learning_rate
from align.training.rollouts.parts import CALLING
from align.training.runs.checkpoint import load_state, newest_checkpoint, tidy_checkpoints, trim_checkpoints
from align.training.runs.durable import speaking, write_atomic
from align.training.runs.identity import Identity, changes, read_identity
from align.training.runs.removal import (
    check_own,
    finish_removal,
    forget_removal,
    is_free,
    is_run,
    remove_run,
    run_recipe,
    tidy,
)
from align.training.runs.state import state_of

# What may change between one start and the next: none of it touches the numbers.
FREE: dict[str, Any] = {"run": ..., "log": ..., "train": {"save_every", "keep", "shard"}}
FREE |= {stage: {"generation": {"engine": PLACES}} for stage in ("ppo", "grpo", "distill")}
for stage in ("ppo", "grpo"):
    FREE[stage]["rewards"] = {"__all__": {*CALLING}}
LENGTH = ("train.epochs", "train.steps", "train.patience")  # what --extend may change
OF_EVALUATIONS = ("episodes.jsonl", "answers.jsonl")  # a line for each response, where a run has them
LINES = {"metrics.jsonl": {"step": int, "split": str}}  # what every line of a file has to have


class Standing(NamedTuple):
    """How far a run is when it is started, as the first process found it."""

    point: Path | None = None  # the checkpoint to go on from
    step: int = 0
    place: int = 0  # examples of the plan's stream that are done
    evaluated: bool = False  # whether metrics.jsonl has an evaluation of this step
    ended: bool = False  # whether the run has a result of this step
    finished: bool = False
    said: tuple[str, ...] = ()


class Run:
    """The folder of one run. The first process alone writes to it."""

    def __init__(self, recipe: BaseRecipe) -> None:
        self.recipe, self.folder = recipe, recipe.folder
        self.standing, self.identity = Standing(), cast(Identity, {})
        self._before: BaseRecipe | None = None  # of the run that is gone on with

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "checkpoints"

    @property
    def final(self) -> Path:
        """Where the result is put, whole or not at all."""
        return self.folder / "final"

    def check(self, fresh: bool, extend: bool = False) -> None:
        """Raise UserError if the folder, which this process holds, has something that this run must not touch.

        Writes nothing, but finishes the removal of a run that was started over when it was killed.
        """
        for name in self.recipe.log.trackers:
            if find_spec(name) is None:
                raise UserError(f"log.trackers: {name} is not installed; run: pip install {name}")
        folder = self.folder
        finish_removal(folder)
        if is_free(folder):
            if extend:
                raise UserError(f"--extend: {folder} holds no run yet; start it without --extend")
            return
        if not is_run(folder):
            raise UserError(
                f"run: {folder} holds files but no run of align (no recipe.yaml that a run wrote); name another folder"
            )
        check_own(folder)
        if fresh:
            return
        try:
            other = load_recipe(folder / "recipe.yaml", [], type(self.recipe))
        except UserError as error:
            raise UserError(
                f"run: {folder} holds another run ({error.problems[0]}); name another folder, "
                "or start over with --fresh"
            ) from None
        changed = differences(other.model_dump(exclude=FREE), self.recipe.model_dump(exclude=FREE))
        length = [change for change in changed if change.startswith(LENGTH)]
        if changed and not (extend and changed == length):
            longer = "; --extend goes on with it to the new end" if changed == length else ""
            raise UserError(
                f"run: {folder} holds another run, which differs in {'; '.join(changed)}; "
                f"name another folder (run=…), or start over with --fresh, which deletes it{longer}"
            )
        self._before = other

    def look(self, identity: Identity, examples: Examples, fresh: bool, extend: bool) -> Standing:
        """How far the run is. Raises UserError where it is of other data, and where it cannot be extended so."""
        if fresh or self._before is None:
            return Standing()
        point, passed_over = newest_checkpoint(self.checkpoints)
        state = state_of(point, load_state(point)) if point else {}
        self._check_same(identity, state, point)
        step, place = state.get("step", 0), state.get("place", 0)
        end, terms = self._end()
        plan = Plan(self.recipe, examples, step, place)
        if place > plan.total or step > plan.steps:
            raise UserError(f"--extend: {step:,} steps are done; train.steps or train.epochs asks for fewer")
        finished = end is not None and end in (plan.steps, -1)
        finished |= terms is not None and terms == patience_end(self.recipe.train.patience, plan.steps)
        if end is not None and not finished and point is None:
            raise UserError(
                f"--extend: {self.checkpoints} has no whole checkpoint to go on from; to go on from the result's "
                f"weights, name another folder (run=…) with train.start_from={self.final}"
            )
        tidy_checkpoints(self.checkpoints)
        tidy(self.folder)
        if point:
            point = point.with_name(point.name.removeprefix(".old-"))
            trim_checkpoints(point, self.recipe.train.keep)
        records = self.records("metrics.jsonl")
        evaluated = any(record["step"] == step and record["split"] == "eval" for record in records)
        said = (*passed_over, *self._extended(examples, plan))
        return Standing(point, step, place, evaluated, end == step, finished, said)

    def _check_same(self, identity: Identity, state: dict[str, Any], point: Path | None) -> None:
        """UserError, with what changed and the ways on, where the run was trained on something else."""
        written, saved = self._identity_there(), state.get("identity")
        if not (written or saved):  # nothing was trained yet, or nobody knows on what
            return
        there = read_identity(written or saved, str(self.folder / "data.json" if written else point))
        changed = changes(there, identity)
        if not changed and saved and saved != there:
            changed = ["its newest checkpoint is of other data"]
        if changed:
            raise UserError(
                f"run: {self.folder} was trained on something else: {'; '.join(changed)}. Restore what changed to go "
                f"on with this run; or train its weights on in another folder (run=… train.start_from={self.folder}); "
                "or start over with --fresh, which deletes it"
            )

    def _identity_there(self) -> Any:
        file = self.folder / "data.json"
        found = parsed(file.read_bytes()) if file.is_file() else None
        return (found or {}).get("identity")

    def _end(self) -> tuple[int | None, dict[str, int] | None]:
        """The step that the result is of, None without one, -1 where it does not say; and under which terms the run
        ended there, where it ended early."""
        file = self.final / "align.json"
        if not self.final.is_dir():
            return None, None
        about = (parsed(file.read_bytes()) if file.is_file() else None) or {}
        return about.get("step", -1), about.get("ended_by")

    def _extended(self, examples: Examples, plan: Plan) -> list[str]:
        """What there is to say of a run that now ends later than it was planned to."""
        assert self._before is not None
        before = Plan(self._before, examples, plan.begun, plan.at).steps
        if before == plan.steps:
            return []
        optim, step = self.recipe.optim, plan.begun
        said = [f"extended: {plan.steps:,} steps in place of {before:,}"]
        ahead = range(step + 1, plan.steps + 1)
        if any(learning_rate(optim, k, plan.steps) != optim.learning_rate for k in ahead):
            said.append(f"the learning rate follows the new plan from step {step + 1} on")
        if plan.at != step * plan.per_step:
            said.append("a step that had fewer examples was the last one before, so later steps begin elsewhere")
        return ["; ".join(said)]

    def open(self, data: Prepared, fresh: bool, steps: int, say: Callable[[str], object] = lambda line: None) -> None:
        """Make the folder ready to go on to step `steps`: what is later than the checkpoint is cut off; with `fresh`,
        the run that is there goes."""
        if fresh and is_run(self.folder):
            remove_run(self.folder)
        write_atomic(self.folder / "recipe.yaml", run_recipe(self.recipe))
        forget_removal(self.folder)
        write_atomic(self.folder / "environment.json", to_json(environment(), indent=1))
        data.ledger.write(self.folder / "ledger.jsonl")
        sides = {"train": _described(data.train), "eval": _described(data.eval)}
        about = {**sides, "summary": data.summary, "identity": self.identity}
        write_atomic(self.folder / "data.json", to_json(about, indent=1))
        for name in ("metrics.jsonl", "samples.jsonl", *OF_EVALUATIONS):
            if name in OF_EVALUATIONS and not (self.folder / name).is_file():
                continue  # not every run has them
            kept = [record for record in self.records(name, say) if self._stays(name, record, steps)]
            write_atomic(self.folder / name, "".join(to_json(record) + "\n" for record in kept))

    def _stays(self, name: str, record: dict[str, Any], steps: int) -> bool:
        """A checkpoint comes after its step's training, and before all else at that step, which is done again: an
        evaluation now, the rest at the end; but for what an earlier end of the run, which has its result, left."""
        step, split = record["step"], record.get("split")
        if step != self.standing.step or not step:
            return step < self.standing.step
        if split == "train":
            return True
        return self.standing.ended and step < steps and split != "eval" and name not in OF_EVALUATIONS

    def append(self, name: str, *records: dict[str, Any]) -> None:
        """Add lines to a JSONL file."""
        lines = "".join(to_json(record) + "\n" for record in records).encode()
        path = self.folder / name
        with speaking(path, len(lines)), path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that relies on it

    def summarise(self, numbers: dict[str, Any]) -> None:
        """Write the run's cost."""
        write_atomic(self.folder / "summary.json", to_json(numbers, indent=1))

    def records(self, name: str, say: Callable[[str], object] = lambda line: None) -> list[dict[str, Any]]:
        """The lines of a JSONL file, each with its `step`; none where there is no file. `say` is told of a torn one."""
        remedy = "restore the file, or start over with --fresh"
        return read_lines(self.folder / name, LINES.get(name, {"step": int}), say=say, remedy=remedy)


def open_trackers(run: Run) -> list[GeneralTracker]:
    """The recipe's trackers, started. Raises UserError for one that cannot start."""
    log, trackers = run.recipe.log, []
    for name in log.trackers:
        kind = LOGGER_TYPE_TO_CLASS[LoggerType(name).value]
        # TensorBoard's folder carries its own name; the others file the run under a project.
        options = {"logging_dir": run.folder} if kind.requires_logging_directory else {}
        try:
            tracker = kind(name if name == "tensorboard" else log.project, **options)
            tracker.start()
        except Exception as error:
            raise UserError(f"log.trackers: {name} cannot start ({str(error).splitlines()[0]})") from None
        trackers.append(tracker)
    return trackers


def _described(examples: Examples) -> dict[str, Any]:
    counts, edges = np.histogram(examples.lengths, bins=min(40, max(1, len(examples)))) if len(examples) else ([], [])
    return {
        "examples": len(examples),
        "tokens": int(examples.lengths.sum()),
        "trained_tokens": int(examples.labels.sum()),
        "lengths": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Values of nested sections that are not the same, each as `key: this there, that here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [d for k in keys for d in differences(there.get(k), here.get(k), f"{name}.{k}".lstrip("."))]
    return [] if there == here else [f"{name}: {json.dumps(there)} there, {json.dumps(here)} here"]
