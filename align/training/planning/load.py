"""What the steps of a run compute: rows, tokens and responses, from the recipe or from the data once it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from align.data.packing import pack
from align.recipe.schema import BaseRecipe

LOOKED_AT = 32  # steps whose rows are laid out to find the largest


class Load(NamedTuple):
    """Of one process, in one step."""

    row: int  # tokens of its largest row
    rows: int  # rows whose gradients are summed before an update
    segment: int  # tokens of one text in a row, between two branchings
    labels: int  # of the largest row
    tokens: int  # of all examples of a step, over all processes
    prompt: int = 0  # where a stage samples: tokens of the longest prompt
    episodes: int = 0  # responses that the process itself samples in a step
    answer: int = 0  # most tokens of a response
    passes: int = 1  # over the step's examples
    held: int = 0  # responses that the process itself samples in an evaluation, where it is known
    beside: Beside | None = None


class Beside(NamedTuple):
    """Language modelling in each of PPO's updates."""

    row: int  # tokens of a process's largest row
    rows: int
    segment: int  # tokens of one text
    tokens: int  # of an update, over all processes


class Drawn(NamedTuple):
    """Responses that a process samples."""

    prompt: int  # tokens of the longest prompt
    answer: int  # most tokens of a response
    episodes: int  # responses in all
    samples: int  # to one prompt


def answering_of(recipe: BaseRecipe) -> Any:
    """`train.generate` of a recipe; None where it has none."""
    return getattr(recipe.train, "generate", None)


def drawings(recipe: BaseRecipe, load: Load, processes: int, length: int | None = None) -> Iterator[tuple[str, Drawn]]:
    """What a process samples itself, by the moment at which it does; other prompts than a step's have `length` tokens,
    default: the most."""
    section, answering, most = sampling_of(recipe), answering_of(recipe), length or recipe.data.max_length
    if load.episodes:
        yield "sampling", Drawn(load.prompt, load.answer, load.episodes, section.samples)
    if load.held:
        yield "evaluating", Drawn(load.prompt, load.answer, load.held, _held_samples(section))
    if answering:
        episodes = ceil(answering.max_rows / processes) * answering.samples
        yield "answering", Drawn(most, answering.generation.max_new, episodes, answering.samples)
    if recipe.log.samples:
        yield "log.samples", Drawn(most, recipe.log.sample_tokens, 1, 1)


def _held_samples(section: Any) -> int:
    """Responses to each held-out prompt."""
    return getattr(section, "eval_samples", section.samples)


def sampling_of(recipe: BaseRecipe) -> Any:
    """The section of a stage that learns from responses, such as PPO's; None of others."""
    section = getattr(recipe, recipe.stage, None)
    if not hasattr(section, "generation") or getattr(section, "on_policy", 1) == 0:
        return None
    return section


def samples_itself(recipe: BaseRecipe) -> bool:
    """Whether the responses of a step are drawn on the run's own trunk, and not by a server."""
    section = sampling_of(recipe)
    return section is not None and section.generation.engine == "own"


def expected(recipe: BaseRecipe, row_tokens: int, processes: int, length: int | None = None) -> Load:
    """From the recipe alone: every example has `length` tokens; default: the most that it may have."""
    paths = 2 if recipe.stage in ("reward", "dpo") and not _unpaired(recipe) else 1
    most, drawn = length or recipe.data.max_length, sampling_of(recipe)
    if drawn is None:
        return _laid_out([most] * recipe.batch.examples, paths, row_tokens, processes)
    prompt, answer, samples = most, drawn.generation.max_new, drawn.samples
    tree = prompt + samples * (answer + 1) - 1
    each = ceil(recipe.batch.examples / getattr(drawn, "minibatches", 1))
    load = _laid_out([tree] * each, samples + 1, row_tokens, processes)
    return load._replace(
        labels=load.row * samples * answer // tree, tokens=tree * recipe.batch.examples, prompt=prompt, answer=answer,
        episodes=ceil(recipe.batch.examples / processes) * samples * samples_itself(recipe),
        passes=getattr(drawn, "epochs", 1), beside=_beside(recipe, row_tokens, processes),
    )  # fmt: skip


def found(
    recipe: BaseRecipe, examples: Any, row_tokens: int, processes: int, held: int = 0, beside: Any = None
) -> Load:
    """From the tokenised examples (`room`, `longest`, `labels`, `paths` of each): the largest row of some steps.

    `held`: held-out examples. `beside`: those of language modelling.
    """
    if section := sampling_of(recipe):
        load = expected(recipe, row_tokens, processes, int(examples.longest.max()))
        return load._replace(
            held=ceil(held / processes) * _held_samples(section) * samples_itself(recipe),
            beside=_beside(recipe, row_tokens, processes, beside),
        )
    return _of_steps(examples, recipe.seed, recipe.batch.examples, row_tokens, processes)


def _beside(recipe: BaseRecipe, row_tokens: int, processes: int, examples: Any = None) -> Beside | None:
    """From the examples of language modelling; without them, each has the most tokens."""
    section = getattr(getattr(recipe, recipe.stage, None), "ptx", None)
    if section is None:
        return None
    if examples is None:
        load = _laid_out([section.max_length] * section.examples, 1, row_tokens, processes)
    else:
        load = _of_steps(examples, recipe.seed, section.examples, row_tokens, processes)
    return Beside(load.row, load.rows, load.segment, load.tokens)


def _of_steps(examples: Any, seed: int, per_step: int, row_tokens: int, processes: int) -> Load:
    """The largest row of some steps of so many examples."""
    room, order = np.asarray(examples.room), examples.order(seed, 0)
    steps = [order[i : i + per_step] for i in range(0, min(len(order), LOOKED_AT * per_step), per_step)]
    rows, largest, count = [], 0, 0
    for chosen in steps:
        laid = pack(room[chosen].tolist(), row_tokens, processes)
        count = max(count, len(laid) // processes)
        for row in laid:
            tokens = int(room[chosen[row]].sum()) if row else 0
            if tokens > largest:
                largest, rows = tokens, chosen[row]
    texts = int((examples.paths[rows] + (examples.paths[rows] > 1)).sum())
    labels = int(np.asarray(examples.labels)[rows].sum()) if hasattr(examples, "labels") else largest
    return Load(largest, count, max(1, largest // max(texts, 1)), labels, int(room.mean() * per_step))


def _laid_out(lengths: Sequence[int], parts: int, row_tokens: int, processes: int) -> Load:
    rows = pack(list(lengths), row_tokens, processes)
    row = max(sum(lengths[i] for i in row) for row in rows)
    return Load(row, len(rows) // processes, max(1, lengths[0] // parts), row, sum(lengths))


def _unpaired(recipe: BaseRecipe) -> bool:
    return recipe.stage == "dpo" and recipe.dpo.loss == "kto"
