"""All that an evaluation reads: prompts, texts, pairs, and the evaluation that a judge compares with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from align.data.formats.prompts import Asked, asked, prompts
from align.data.formats.reading import Reading
from align.data.mixture import Prepared
from align.data.templates.preferences import preferences
from align.data.templates.render import conversations
from align.recipe.errors import UserError
from align.recipe.schema import Eval, Source
from align.tools.comparison.evaluated import Evaluated, read_run
from align.tools.evaluation.drawn_pairs import check_conversations
from align.tools.evaluation.folder import source_names
from align.tools.evaluation.generation import Prompts, distinct_prompts
from align.tools.evaluation.harness import check_installed
from align.tools.evaluation.judging import EndpointJudge
from align.tools.evaluation.whole_texts import read_whole
from align.tools.pipeline.written import gathering
from align.training.session import Session


class Given(NamedTuple):
    """All that an evaluation reads, before any model is loaded."""

    data: Prepared
    prompts: Prompts
    rows: list[Asked]  # what each prompt was made of
    texts: dict[str, Prepared]  # of `perplexity`, by name
    whole: dict[str, np.ndarray]  # tokens of `whole_texts`, by name
    pairs: dict[str, Prepared]
    judges: list[tuple[EndpointJudge, Evaluated]]


def read(session: Session) -> Given:
    """Raises UserError with all that cannot be had, before any model is loaded."""
    recipe, section, problems = session.recipe, session.recipe.evaluate, []
    judges: list[tuple[EndpointJudge, Evaluated]] = []
    if section.lm_eval:
        with gathering(problems):
            check_installed()
    for i, judge in enumerate(section.judges):
        key = f"evaluate.judges.{i}"
        with gathering(problems):
            judges.append((EndpointJudge(judge.openai, f"{key}.openai"), read_run(Path(judge.against), None, None)))
    if problems:
        raise UserError(*problems)
    tokenizer = session.tokenizer()
    room, key = section.generation.max_new, "evaluate.generation.max_new"
    data = session.prepare(tokenizer, prompts(), room=room, key=key)
    examples = getattr(data, section.side)
    if session.show:
        session.show_examples(data._replace(train=examples), tokenizer)
    found = distinct_prompts(examples)
    session.say(f"{len(found.keys):,} prompts from the {section.side} side, {found.repeated:,} rows repeat one of them")
    for judge, (_, other) in zip(section.judges, judges, strict=True):
        if (other.about.prompts, other.keys) != (found.key, found.keys):
            raise UserError(f"{judge.against}: it was evaluated on other prompts; evaluate both on the same ones")
    everyone = asked(examples)
    rows = [everyone[int(i)] for i in found.chosen]
    if section.preferences:
        check_conversations(rows)

    def others(names: list[str], sources: list[Source], reading: Reading) -> dict[str, Prepared]:
        sections = [recipe.data.model_copy(update={"train": [source], "eval": Eval()}) for source in sources]
        return {name: session.prepare(tokenizer, reading, one) for name, one in zip(names, sections, strict=True)}

    names = source_names([*(source.path for source in section.perplexity), *section.whole_texts])
    texts = others(names[: len(section.perplexity)], section.perplexity, conversations("assistant"))
    whole = {}
    if texts:
        session.say(
            "perplexity: the end of each turn or text counts; each paragraph of a text file is a text of its own"
        )
    for name, path in zip(names[len(texts) :], section.whole_texts, strict=True):
        with gathering(problems):
            whole[name] = read_whole(path, tokenizer)
    if problems:
        raise UserError(*problems)
    pairs = others(source_names([source.path for source in section.pairs]), section.pairs, preferences())
    return Given(data, found, rows, texts, whole, pairs, judges)
