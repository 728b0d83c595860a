"""What to change in a recipe that does not fit, and the largest that fits: settings are tried on the plan itself.

The changes are in order of what they cost: first those that change speed alone, then those that change the weights'
precision.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from align.recipe.errors import UserError
from align.recipe.schema import BaseRecipe
from align.training.planning.load import answering_of, drawings, sampling_of
from align.training.planning.memory import Memory, memory
from align.training.planning.parts import Setting, setting
from align.training.planning.words import room

MOST_TOKENS = 2**20


class Change(NamedTuple):
    """Keys of a recipe and their values."""

    keys: dict[str, Any]
    why: str

    @property
    def words(self) -> str:
        """As overrides on a command line, quoted for a shell."""
        return " ".join(
            shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
            for key, value in _flat(self.keys)
        )


def _flat(keys: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of single values."""
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def changed(recipe: BaseRecipe, keys: dict[str, Any]) -> BaseRecipe:
    """The recipe with values at dotted keys. Raises UserError where they do not go with the rest."""
    values = recipe.model_dump()
    for key, value in keys.items():
        *above, last = key.split(".")
        section = values
        for name in above:
            section = section[name]
        section[last] = value
    try:
        return type(recipe).model_validate(values)
    except ValueError as error:
        raise UserError(str(error)) from None


def advice(at: Setting, plan: Memory, length: int | None) -> tuple[list[Change], Memory]:
    """Changes, one after the other until the run fits, and the plan with all of them; none where it fits already."""
    have, taken = room(at.device, at.processes), []
    while plan.peak.bytes > have:
        best = next(_useful(at, plan, length), None)
        if best is None:
            break
        change, at, plan = best
        taken.append(change)
    return _merged(taken), plan


def _useful(at: Setting, plan: Memory, length: int | None) -> Iterator[tuple[Change, Setting, Memory]]:
    """Changes that lower the peak, or what does not fit: the cheapest first."""
    for change in _changes(at, plan):
        try:
            other = _at(at, change.keys)
            found = memory(other, length)
        except UserError:
            continue
        if found.peak.bytes < 0.995 * plan.peak.bytes:
            yield change, other, found


def _changes(at: Setting, plan: Memory) -> Iterator[Change]:
    recipe, longest = at.recipe, at.recipe.data.max_length
    rows = recipe.batch.row_tokens
    row = plan.load.row if rows == "auto" else min(rows, plan.load.row)
    drawn, shown = sampling_of(recipe), _shown(recipe)
    asked = [d.prompt + d.answer for name, d in drawings(recipe, plan.load, at.processes) if name == plan.peak.name]
    if asked and plan.cache_tokens // 2 >= max(asked):
        yield Change({"batch.cache_tokens": plan.cache_tokens // 2}, "fewer responses are sampled at once")
    if drawn:
        longest += drawn.samples * (drawn.generation.max_new + 1) - 1
    if row // 2 >= longest:
        yield Change({"batch.row_tokens": max(longest, row // 2)}, "shorter rows, more of them")
    if not recipe.model.gradient_checkpointing:
        yield Change({"model.gradient_checkpointing": True}, "activations are computed again: a third more time")
    if recipe.stage == "dpo" and recipe.lora is None:
        yield Change({"dpo.reference": "cached"}, "the reference's numbers are computed once, ahead")
    if at.processes > 1 and recipe.train.shard == "none":
        yield Change({"train.shard": "layers"}, "the trunk lies over the devices")
        if shown:
            words = "the trunk lies over the devices; nothing is sampled to be shown, for which it would be whole"
            yield Change({"train.shard": "layers", **shown}, words)
    if shown and plan.peak.name in ("answering", "log.samples"):
        yield Change(shown, "nothing is sampled to be shown")
    if drawn and drawn.samples > 1 and row <= longest:
        yield Change({f"{recipe.stage}.samples": drawn.samples // 2}, "fewer responses to a prompt: a smaller tree")
    if recipe.lora is None:
        more = {"classify.train": "lora"} if recipe.stage == "classify" else {}
        yield Change({"lora": {"r": 16}, **more}, "a LoRA trains instead of all weights")
    if recipe.lora is not None and recipe.model.quantize is None:
        yield Change({"model.quantize": "8bit"}, "the trunk in 8 bits")
    if recipe.lora is not None and recipe.model.quantize == "8bit":
        yield Change({"model.quantize": "4bit"}, "the trunk in 4 bits")
    if recipe.data.max_length > 64:
        yield Change({"data.max_length": recipe.data.max_length // 2}, "shorter examples")


def _shown(recipe: BaseRecipe) -> dict[str, Any]:
    """Keys that leave out what is sampled beside training, to be read."""
    keys: dict[str, Any] = {"log.samples": []} if recipe.log.samples else {}
    return keys | ({"train.generate": None} if answering_of(recipe) else {})


def _merged(changes: list[Change]) -> list[Change]:
    """The last value of each key, where it was first changed."""
    last: dict[str, Change] = {}
    for change in changes:
        last[next(iter(change.keys))] = change
    return list(last.values())


def _at(at: Setting, keys: dict[str, Any]) -> Setting:
    recipe = changed(at.recipe, keys)
    if all(key.startswith("batch.") for key in keys):
        return at._replace(recipe=recipe)
    return setting(recipe, at.device, at.processes)


def largest_row(at: Setting) -> int:
    """Tokens of the largest row that fits, with everything else as the recipe has it; 0 where none does."""

    def fits(tokens: int) -> bool:
        keys = {"batch.row_tokens": tokens, "data.max_length": min(tokens, at.recipe.data.max_length)}
        other = at._replace(recipe=changed(at.recipe, keys))
        load = memory(other).load._replace(row=tokens, labels=tokens)
        return memory(other, load=load).peak.bytes <= room(at.device, at.processes)

    return _most(fits, MOST_TOKENS)


def largest_rollout(at: Setting, length: int | None) -> int:
    """Responses that can be sampled at once on one device."""
    per_prompt, have = sampling_of(at.recipe).samples, room(at.device, at.processes)

    def fits(episodes: int) -> bool:
        prompt = length or at.recipe.data.max_length
        tokens = episodes * (prompt + sampling_of(at.recipe).generation.max_new)
        other = at._replace(recipe=changed(at.recipe, {"batch.cache_tokens": tokens}))
        load = memory(other, length).load._replace(episodes=episodes)
        moment = next(m for m in memory(other, length, load).moments if m.name == "sampling")
        return moment.bytes <= have

    return _most(lambda n: fits(n * per_prompt), 2**14) * per_prompt


def _most(fits: object, most: int) -> int:
    """The largest of 1 … most that fits, by halving; 0 where none does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
