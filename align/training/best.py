"""The best evaluation of a run, by one of its figures, and the end of a run that no longer gains.

What is known of earlier evaluations stands in the loop's memory, and so in each checkpoint.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from align.recipe.errors import UserError
from align.recipe.source import FIGURES

if TYPE_CHECKING:
    from align.training.loop import Loop

FOLDER = "best"
BEST, JUDGED = "best", "judged"  # in the memory: the best evaluation, and the last one with evaluations since
SOUND = ("loss", "kl")  # a number at every evaluation, unless the weights give none


def judged(loop: Loop, record: dict[str, Any], measured: bool) -> None:
    """Put the weights in `best/` if this evaluation is the best so far; every process must call it.

    `measured`: whether it has the figures of answers, which not all evaluations have. Raises UserError where it has no
    figure of that name. The evaluation before the first step only says whether there is one.
    """
    best = loop.recipe.train.best
    if best is None or (best.metric not in record and best.metric.startswith("generate/") and not measured):
        return
    value = figure(best.metric, record)
    last = loop.memory.get(JUDGED, {"step": 0, "without_gain": 0})
    if loop.step == last["step"]:  # the first, or one that is done again
        return
    sign, before = 1 if best.goal == "greatest" else -1, loop.memory.get(BEST)
    broken = any(math.isnan(figure(name, record)) for name in SOUND if name in record)
    gains = math.isfinite(value) and not broken and loop.algorithm.may_be_best(record)
    gains = gains and (before is None or sign * value > sign * before[best.metric])
    loop.memory[JUDGED] = {"step": loop.step, "without_gain": 0 if gains else last["without_gain"] + 1}
    if gains:
        found = {"step": loop.step, best.metric: value} | ({"kl": record["kl"]} if "kl" in record else {})
        loop.memory[BEST] = found
        loop.publish(loop.run.folder / FOLDER, loop.algorithm.described(loop, last=False) | found)


def figure(metric: str, record: dict[str, Any]) -> float:
    """A figure of an evaluation, nan where it is not known. UserError where there is none of that name."""
    numbers = [name for name, value in record.items() if value is None or isinstance(value, float)]
    if metric in numbers:
        return math.nan if record[metric] is None else record[metric]
    known = [name for name in numbers if not name.endswith(FIGURES)]
    close = get_close_matches(metric, known, 1)
    meant = f"did you mean {close[0]!r}? There are" if close else "there are"
    raise UserError(f"train.best.metric: no figure of an evaluation is {metric!r}; {meant} {', '.join(known)}")


def over(loop: Loop) -> bool:
    """Whether the run has gone on for as long as its patience without a gain."""
    patience = loop.recipe.train.patience
    return patience is not None and JUDGED in loop.memory and loop.memory[JUDGED]["without_gain"] >= patience


def patience_end(patience: int | None, steps: int) -> dict[str, int]:
    """What the result of a run says that has ended before its `steps` were done: under which terms."""
    return {"patience": patience or 0, "of_steps": steps}


def told(loop: Loop) -> dict[str, Any]:
    """What the run's result tells of it."""
    found = {BEST: loop.memory[BEST]} if BEST in loop.memory else {}
    if loop.step < loop.plan.steps:
        found["ended_by"] = patience_end(loop.recipe.train.patience, loop.plan.steps)
    return found


def in_words(loop: Loop) -> str:
    """Why the run ends here."""
    best, metric = loop.memory.get(BEST), loop.recipe.train.best.metric
    since = f"since step {best['step']}, the best" if best else "none may be kept"
    count = loop.memory[JUDGED]["without_gain"]
    many = f"{count} evaluation{'s' * (count > 1)}"
    return f"no gain in {metric} in {many} ({since}): it ended after step {loop.step} of {loop.plan.steps}"
