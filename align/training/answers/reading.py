"""The prompts that a run answers, read and checked before any weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from align.data.mixture import Prepared, counting
from align.data.prompt_set import NAMED, PromptSet, prompt_set
from align.models.checkpoints.results import SCORING
from align.models.limits import check_prompt, limits_of
from align.recipe.errors import UserError
from align.training.answers.measures import check_measures
from align.training.borders.processes import first_then_others

if TYPE_CHECKING:
    from align.training.session import Session


def with_prompts(session: Session, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The run's data with the prompts of `train.generate`, where the recipe has it.

    Raises UserError for rows, lengths and measures that cannot be.
    """
    recipe, section = session.recipe, getattr(session.recipe.train, "generate", None)
    if section is None:
        return data

    def read() -> PromptSet:
        with counting(session.console) as progress:
            return prompt_set(
                section.sources, data.eval, recipe.data, section.max_rows, recipe.seed, tokenizer, data.ledger, progress
            )

    found = first_then_others(session.accelerator, read)
    for line in found.said:
        session.say(line)
    check_measures(section.measures, found)
    limits = limits_of(recipe.model, tokenizer, recipe.lora, recipe.stage in SCORING)
    room, key = section.generation.max_new, "train.generate.generation.max_new"
    problems = [
        problem
        for stem, where in zip(found.stems, found.where, strict=True)
        for problem in check_prompt(limits, tokenizer, stem.tolist(), room, where, key)
    ]
    if problems:
        raise UserError(*problems[:NAMED])
    longest = max(map(len, found.stems)) + room
    if limits.reach and longest > limits.reach:
        session.say(
            f"a held-out prompt and {key}={room:,} take {longest:,} positions; {limits.name} was trained on "
            f"{limits.reach:,}, and may be worse beyond them"
        )
    return data._replace(prompts=found, summary=[*data.summary, *found.said])
