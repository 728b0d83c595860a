"""What a running stage stands on: its recipe, its processes, its screen, its folder and the signals that stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from align.data.examples import Examples
from align.data.formats.reading import Reading
from align.data.mixture import Prepared, counting, prepare
from align.data.templates.day import day_of
from align.data.templates.marking import show
from align.models.base import load_tokenizer
from align.models.checkpoints.results import SCORING
from align.models.checkpoints.sources import foreign
from align.models.demo import cache_folder
from align.models.limits import Wanted, check, check_prompt, limits_of
from align.models.sampling.decode import asked_ids
from align.recipe.errors import UserError, printable
from align.recipe.locks import claimed
from align.recipe.schema import BaseRecipe, Data
from align.training.answers.answers import KEY
from align.training.answers.reading import with_prompts
from align.training.borders.foreign import foreign as foreign_code
from align.training.borders.processes import any_asked, decided, first_then_others
from align.training.borders.stops import Signals, Stopped
from align.training.planning.usage import Usage
from align.training.rollouts.rewards import stands_on
from align.training.runs.identity import identity_of
from align.training.runs.run import Run
from align.training.runs.start import find_start

SHOWN = 3  # examples that --show prints
T = TypeVar("T")


class Begun(NamedTuple):
    """A run that has something left to do."""

    run: Run
    data: Prepared
    others: dict[str, Examples]  # what it reads besides, by name


@dataclass(frozen=True)
class Session:
    """What every stage starts from."""

    recipe: BaseRecipe
    accelerator: Accelerator
    console: Console  # silent on all processes but the first
    fresh: bool
    show: bool
    extend: bool = False
    signals: Signals = field(default_factory=Signals)
    held: ExitStack = field(default_factory=ExitStack)  # what is let go of when the stage ends
    usage: Usage = field(default_factory=Usage)  # the memory that it takes

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.accelerator.is_main_process

    def begin(
        self,
        reading: Reading,
        others: Mapping[str, tuple[Reading, Data]] | None = None,
        results: Mapping[str, str] | None = None,
        records: bool = False,
        room: int = 0,
        key: str = "",
    ) -> Begun | None:
        """The run's folder and its data; None where there is nothing to train: after `--show`, or in a finished run.

        `others`: what else the stage reads, by name; `results` and `records` as in `identity_of`; `room`: tokens that
        are sampled after each example, as the recipe's `key` says.
        """
        run = self.open_run()
        tokenizer = self.tokenizer()
        data = self.prepare(tokenizer, reading, room=room, key=key)
        beside = {name: self.prepare(tokenizer, *other, name=name) for name, other in (others or {}).items()}
        more = {name: other.train for name, other in beside.items()}
        if self.show:
            self.show_examples(data, tokenizer)
            return None
        sides = {"train": data.train, "eval": data.eval, **more}
        data = with_prompts(self, data.beside(beside), tokenizer)
        if data.prompts:
            results = {**(results or {}), **stands_on(self.recipe.train.generate.scores, KEY)["results"]}
        answered = data.prompts.identity if data.prompts else None
        unfinished = self.unfinished(run, tokenizer, sides, results, records, answered)
        return Begun(run, data, more) if unfinished else None

    def open_run(self) -> Run:
        """The run, its folder held and checked before anything in it is read; `--show` looks at no folder."""
        run = Run(self.recipe)
        if not self.show:
            self.decided(lambda: self._claim(run))
        return run

    def _claim(self, run: Run) -> None:
        self.claim(run.folder)
        run.check(self.fresh, self.extend)
        if self.recipe.train.start_from:
            find_start(self.recipe.train.start_from)

    def claim(self, folder: Path) -> None:
        """Hold a folder until the stage ends; for the first process alone. UserError where another process has it."""
        self.held.enter_context(claimed(folder))

    def unfinished(
        self,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        sides: Mapping[str, Examples],
        results: Mapping[str, str] | None = None,
        records: bool = False,
        answered: str | None = None,
    ) -> bool:
        """Whether there is something left to do; says so where there is not. Arguments as of `identity_of`.

        Raises UserError where the run in the folder was trained on something else than these `sides`.
        """

        def look() -> tuple:
            identity = identity_of(self.recipe, tokenizer, sides, results, records, answered)
            return identity, run.look(identity, sides["train"], self.fresh, self.extend)

        run.identity, run.standing = self.decided(look)
        if run.standing.finished:
            self.say(f"{run.final} is already there: nothing to do (--fresh starts over, --extend trains on)")
        return not run.standing.finished

    def decided(self, function: Callable[[], T]) -> T:
        """What `function` gives in the first process, in all."""
        return decided(self.accelerator, function)

    def heed(self) -> None:
        """Raise Stopped where any process was asked to stop; every process has to come by here."""
        if any_asked(self.accelerator, bool(self.signals.asked)):
            raise Stopped

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The recipe's; the first process fetches what is not there yet. Says which day its chat template writes."""
        tokenizer = first_then_others(self.accelerator, lambda: load_tokenizer(self.recipe.model))
        if (day := day_of(tokenizer.get_chat_template())) and self.recipe.model.template_day is None:
            self.say(f"the chat template writes a date: {day} in every conversation (model.template_day)")
        return tokenizer

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        section: Data | None = None,
        room: int = 0,
        key: str = "",
        name: str = "",
    ) -> Prepared:
        """The run's data, or another section's by its `name`; the first process tokenises, the others then find it in
        the cache.

        Raises UserError for what the model cannot take, before it is loaded.
        """
        recipe = self.recipe

        def read() -> Prepared:
            with counting(self.console) as progress:
                data, seed = section or recipe.data, recipe.seed
                return prepare(data, tokenizer, reading, seed, cache_folder(), progress, border=foreign_code)

        data = first_then_others(self.accelerator, read)
        for line in data.named(name) if name else data.summary:
            self.say(line)
        self.check_limits(tokenizer, [Wanted(side, room, key) for side in (data.train, data.eval)])
        return data

    def check_limits(self, tokenizer: PreTrainedTokenizerBase, wanted: list[Wanted]) -> None:
        """Say what goes beyond the model's training; UserError for what it cannot take. No weights are loaded."""
        recipe = self.recipe
        lora, log = getattr(recipe, "lora", None), getattr(recipe, "log", None)
        limits = limits_of(recipe.model, tokenizer, lora, recipe.stage in SCORING)
        problems = []
        for number, prompt in enumerate(log.samples if log else ()):
            where = f"log.samples.{number}"
            with foreign(f"{where}: the chat template cannot write it"):
                ids = asked_ids(tokenizer, prompt, log.samples_as)
            problems += check_prompt(limits, tokenizer, ids, log.sample_tokens, where)
        if problems:
            raise UserError(*problems)
        for remark in check(limits, tokenizer, wanted):
            self.say(remark)

    def say(self, line: str) -> None:
        """Print a line, with control characters spelt out."""
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def show_examples(self, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
        """What `--show` prints: the first examples of the first epoch, their trained tokens marked."""
        for i in data.train.order(self.recipe.seed, 0)[:SHOWN]:
            tree = data.train.tree(int(i))
            self.say(f"\n{data.train.where(int(i))} ({tree.packed_length} tokens, {tree.label_count} trained)")
            self.console.print(show(tree, tokenizer, colour=self.console.is_terminal), soft_wrap=True)
