"""Reward functions of the user's own, called as their part of the recipe says: in the run, awaited, or in processes of
their own."""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.recipe.errors import UserError
from align.training.borders.foreign import foreign
from align.training.rollouts.awaited import Await, together
from align.training.rollouts.given import Verdict, numbers, pause, verdicts
from align.training.rollouts.parts import Answered, RewardPart
from align.training.rollouts.pool import Pool
from align.training.rollouts.worker import is_async

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Any]


class Function:
    """One of them: what is called, and how."""

    def __init__(self, part: RewardPart, function: RewardFunction, key: str) -> None:
        """Raises UserError, which names the recipe's `key`, for a time-out that cannot be kept."""
        self.part, self.function = part, function
        self.pool = Pool(part.function, part.processes, part.timeout, part.retries) if part.processes else None
        self.awaited = is_async(function) and self.pool is None
        self.failed: str | None = None  # why it gave no score, where that was left out
        if part.timeout and not (self.awaited or self.pool):
            raise UserError(
                f"{key}.timeout: {part.function} is not async, so only a process of its own can be ended in time; add "
                "`processes: 1` (or more), with which each response is a call"
            )

    def settled(self, said: Sequence[Verdict]) -> list[float]:
        """Scores, nan for responses that are left out. Raises UserError for the first that is not to be."""
        if failures := [verdict for verdict in said if isinstance(verdict, str)]:
            if self.part.on_failure == "stop":
                raise UserError(f"the reward function {self.part.function} {failures[0]}")
            self.failed = failures[-1]
        return [math.nan if isinstance(verdict, str) else verdict for verdict in said]


def imported(part: RewardPart, key: str) -> Function:
    """The function that a part names. Raises UserError where it is not to be had."""
    module, _, attribute = part.function.partition(":")
    name = f"{key}.function: {module}"
    found = foreign(f"{name} cannot be imported", lambda: importlib.import_module(module))
    function = foreign(f"{name} has no function {attribute!r}", lambda: getattr(found, attribute, None))
    if not callable(function):
        raise UserError(f"{name} has no function {attribute!r}")
    return Function(part, function, key)


def called(functions: Mapping[str, Function], answered: Sequence[Answered]) -> dict[str, list[float]]:
    """Scores of all responses by the name of each function; nan where there is none and the recipe leaves that out.

    Functions that are `async` are awaited together. Raises UserError as `Function.settled` does.
    """
    if not answered:
        return {title: [] for title in functions}
    responses = [one.response for one in answered]
    waited = {title: function for title, function in functions.items() if function.awaited}
    said: dict[str, list[Verdict]] = {}
    if waited:
        calls = [
            Await(_call(function, answered), responses, function.part.timeout, function.part.retries)
            for function in waited.values()
        ]
        names = ", ".join(function.part.function for function in waited.values())
        said |= zip(waited, foreign(f"the reward functions {names} failed", lambda: together(calls)), strict=True)
    for title, function in functions.items():
        if function.pool:
            said[title] = function.pool([(one.prompt, one.response, one.asked.record) for one in answered])
        elif not function.awaited:
            said[title] = _in_the_run(function, answered, responses)
    return {title: function.settled(said[title]) for title, function in functions.items()}


def _call(function: Function, answered: Sequence[Answered]) -> Callable[[], Any]:
    def call() -> Any:
        rows = copy.deepcopy([one.asked.record for one in answered])  # its own, which it may change
        return function.function([one.prompt for one in answered], [one.response for one in answered], rows)

    return call


def _in_the_run(function: Function, answered: Sequence[Answered], responses: list[str]) -> list[Verdict]:
    call = _call(function, answered)
    for attempt in range(function.part.retries + 1):
        if attempt:
            time.sleep(pause(attempt))
        try:
            return verdicts(foreign("failed", lambda: numbers(call(), len(responses))), responses)
        except UserError as error:
            (why,) = error.problems
    return [why] * len(responses)
