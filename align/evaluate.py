"""Evaluate a policy: its responses to prompts, scored, and how far it has gone from where it started.

    accelerate launch -q -m align.evaluate recipes/evaluate.yaml

For prompts x, each once, it samples y ~ p(·|x) and measures, each with an interval over prompts,

    the scores s(x, y); log p(y|x) - log ref(y|x) and sum_t KL(p(·|x, y_<t) || ref(·|x, y_<t)), whose expectations
    are both KL(p || ref); lengths, ends, repetition, variety and entropy of y

and, if asked, perplexity, a reward model's accuracy, a judge's verdicts and tasks of lm-eval. A response depends on
(seed, prompt, number of the sample) alone, so two policies that are compared share their random numbers. Left out on
purpose: one number for all of it; `align.compare` reads what is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.models.roles import Roles
from align.recipe.errors import UserError
from align.recipe.paths import Location
from align.recipe.records import to_json
from align.recipe.schema import Data, Model, PositiveInt, Section, Source
from align.tools.evaluation.drawn_pairs import Preferences, drawn_pairs
from align.tools.evaluation.folder import (
    PREFERENCES,
    RESULT,
    check_folder,
    clear,
    identities,
    in_words,
    ledger_lines,
    response_lines,
    tokenizer_hash,
)
from align.tools.evaluation.generation import Answering, respond
from align.tools.evaluation.harness import LmEval, harness
from align.tools.evaluation.judging import Endpoint, judged
from align.tools.evaluation.measures import accuracies, measures, perplexity
from align.tools.evaluation.policy import NO_UPDATE, load_policy, read_policy, trained
from align.tools.evaluation.reading import read
from align.tools.evaluation.whole_texts import whole_perplexity
from align.training.batches import Batches
from align.training.bootstrap import Draws
from align.training.borders.foreign import foreign
from align.training.launch import run_stage
from align.training.meters import environment
from align.training.rollouts.parts import RewardPart
from align.training.rollouts.rewards import Rewards
from align.training.runs.durable import write_atomic
from align.training.screen import Screen
from align.training.session import Session

RESAMPLES = 2000


class Judge(Section):
    """A language model that says which of two responses is better."""

    openai: Endpoint
    """An endpoint that speaks OpenAI's protocol."""
    against: Location
    """Run folder of another evaluation over the same prompts: the first response to each is the opponent."""
    name: Annotated[str, Field(pattern=r"^[\w-]+$")] = "judge"
    """What it is called in the metrics."""


class Evaluate(Section):
    """What is asked, and how answers are measured."""

    side: Literal["train", "eval"] = "train"
    """Which side of `data` the prompts are: with the sources, `data.eval` and seed of a training run, `eval` is what
    that run held out."""
    samples: PositiveInt = 4
    """Responses to each prompt."""
    generation: Answering = Field(default_factory=Answering)
    """How they are drawn."""
    scores: list[RewardPart] = Field(default_factory=list)
    """What scores a response, by name: reward models, other classifiers, functions. Scores are raw."""
    perplexity: list[Source] = Field(default_factory=list)
    """Conversations or texts whose perplexity is measured, source by source: of each row by itself, with the token that
    ends its turn or text. A paragraph of a text file is a row."""
    whole_texts: list[Location] = Field(default_factory=list)
    """Text files whose perplexity is measured as one text each, paragraphs and all, in windows of `data.max_length`
    tokens."""
    pairs: list[Source] = Field(default_factory=list)
    """Preference pairs on which the accuracy of every `adapter` score is measured, source by source."""
    preferences: Preferences | None = None
    """Write preferences.jsonl: pairs of responses to train on. Default: none."""
    judges: list[Judge] = Field(default_factory=list)
    """Judges of this run's responses against another's."""
    lm_eval: LmEval | None = None
    """Tasks of lm-evaluation-harness. Default: none."""

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluate:
        if any((part.weight, part.mean, part.std, part.clip) != (1.0, None, None, None) for part in self.scores):
            raise ValueError("`scores` are raw and not summed: leave `weight`, `mean`, `std` and `clip` out")
        if self.pairs and not any(part.adapter for part in self.scores):
            raise ValueError("`pairs`: no score is an `adapter`, whose accuracy they would tell")
        if self.preferences and self.preferences.score not in (known := [part.title for part in self.scores]):
            raise ValueError(f"`preferences.score`: {self.preferences.score!r} is none of {', '.join(known) or 'none'}")
        if 1 < self.generation.beams < self.samples:
            raise ValueError("`samples`: a search has as many responses as beams at most")
        if self.preferences and self.generation.beams > 1:
            raise ValueError("`preferences` are of responses that are drawn; leave `beams` out")
        if self.preferences and self.samples < 2:
            raise ValueError("`preferences` are of two responses to a prompt; give `samples: 2` or more")
        if len({judge.name for judge in self.judges}) < len(self.judges):
            raise ValueError("`judges`: two have the same name; give each its `name`")
        return self


class Rows(Section):
    """How much is computed at once."""

    row_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most tokens in one packed row. Changes speed and memory, never a response."""
    cache_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most tokens whose keys and values are kept at once while it samples; `auto` follows the free memory."""


class Recipe(Section):
    """An evaluation of one policy."""

    stage: Literal["evaluate"]
    """This tool."""
    run: Location
    """The output folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the responses, the bootstrap's resamples, and the split where there is one."""
    model: Model
    policy: Location | None = None
    """`final/` or `best/` folder of a run that trained a LoRA on this trunk. Default: the trunk itself, from which such
    runs started."""
    data: Data
    batch: Rows = Field(default_factory=Rows)
    evaluate: Evaluate = Field(default_factory=Evaluate)

    @model_validator(mode="after")
    def _has_a_side(self) -> Recipe:
        held = self.data.eval
        if self.evaluate.side == "eval" and not (held.fraction or held.sources):
            raise ValueError("`evaluate.side: eval` needs held-out rows: give `data.eval` a fraction or sources")
        if self.data.overlong == "truncate":
            raise ValueError("`data.overlong: truncate`: a prompt without its end asks something else; drop it")
        return self


def evaluate(session: Session) -> None:
    """The tool, from recipe to evaluation.json."""
    recipe, section, folder = session.recipe, session.recipe.evaluate, Path(session.recipe.run)
    if session.extend:
        raise UserError("--extend: an evaluation has no later end; leave it out")
    if not session.show and session.decided(lambda: finished(session, folder)):
        session.say(f"{folder / RESULT} is already there: nothing to do (--fresh starts over)")
        return
    saved = read_policy(recipe.policy) if recipe.policy else None
    training = trained(saved) if saved else None
    given = read(session)
    if session.show:
        return

    # 1. The trunk, the policy on it, and what scores.
    trunk = load_policy(recipe.model, saved, session.accelerator, recipe.seed)
    trunk.budgets = trunk.budgets.asked(recipe.batch.cache_tokens)
    rewards = Rewards(section.scores, trunk, "evaluate.scores")
    temperature = section.generation.temperature
    roles = Roles(trunk, NO_UPDATE, rewards.scorers, None, temperature, recipe.seed, critic=False)
    batches, draws = Batches(trunk, session.accelerator, recipe.batch.row_tokens), Draws(RESAMPLES, recipe.seed)
    if session.first:
        clear(folder, recipe)

    with Screen(session.console) as screen:
        # 2. Responses, and what is said of them.
        how, samples = section.generation, section.samples
        responses = respond(
            roles, rewards, batches, given.prompts, given.rows, how, samples, recipe.seed, screen, session.signals
        )
        # 3. Measures of known answers.
        metrics = measures(responses, draws)
        for name, data in given.texts.items():
            metrics[f"perplexity/{name}"] = perplexity(batches, data.train, screen, draws)
        for name, ids in given.whole.items():
            metrics[f"perplexity/{name}"] = whole_perplexity(batches, ids, recipe.data.max_length, screen)
        for name, data in given.pairs.items():
            found = accuracies(roles, [*rewards.scorers], batches, data.train, screen, draws)
            metrics |= {f"accuracy/{score}/{name}": accuracy for score, accuracy in found.items()}

    # 4. Preferences, judges and tasks: the first process asks, and writes.
    if session.first:
        counts, pairs = dict[str, Any](), None
        if section.preferences:
            by = section.preferences.score
            pairs = drawn_pairs(given.rows, given.prompts.keys, responses, by, recipe.seed)
            metrics[f"preferences/{by}"] = pairs.accuracy(draws)
        for judge, asked_of in zip(section.judges, given.judges, strict=True):
            won, counts[judge.name] = judged(judge.name, *asked_of, responses, draws)
            counts[judge.name]["against"] = judge.against
            metrics |= won
        if section.lm_eval:
            asking = partial(harness, trunk, section.lm_eval, recipe.seed)
            metrics |= foreign("evaluate.lm_eval: the tasks could not be asked", asking)
        about = {
            "stage": "evaluate",
            "name": folder.resolve().name,
            "policy": recipe.policy or "the trunk itself",
            "fingerprint": trunk.fingerprint,
            "tokenizer": tokenizer_hash(trunk.tokenizer),
            "prompts": given.prompts.key,
            "sampling": {"samples": section.samples, "seed": recipe.seed, **section.generation.model_dump()},
            "scores": identities(section.scores),
            "metrics": {name: metric._asdict() for name, metric in metrics.items()},
            "judges": counts,
            "preferences": pairs and {"pairs": len(pairs.rows), "left_out": pairs.left_out},
            "training": training,
        }
        write_atomic(folder / "environment.json", to_json(environment(), indent=1))
        write_atomic(folder / "ledger.jsonl", ledger_lines([given.data, *given.texts.values(), *given.pairs.values()]))
        write_atomic(folder / "responses.jsonl", response_lines(given.prompts, responses))
        if pairs:
            write_atomic(folder / PREFERENCES, pairs.lines())
        write_atomic(folder / RESULT, to_json(about, indent=1))
        for line in in_words(metrics, responses, counts, pairs):
            session.say(line)
        for title, why in rewards.failed.items():
            session.say(f"score {title}: the function {why}")
        session.say(f"done: {folder / RESULT}")
    session.accelerator.wait_for_everyone()


def finished(session: Session, folder: Path) -> bool:
    """Whether the folder, which is held from now on, has what would be written. UserError where it is another's."""
    session.claim(folder)
    check_folder(session.recipe, session.fresh)
    return (folder / RESULT).is_file() and not session.fresh


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.evaluate", evaluate, argv)


if __name__ == "__main__":
    main()
