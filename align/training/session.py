"""What a running stage stands on: its recipe, its processes and its screen."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from align.data.marking import show
from align.data.mixture import Prepared, counting, prepare
from align.data.reading import Reading
from align.models.base import load_tokenizer
from align.models.decode import asked_ids
from align.models.demo import cache_folder
from align.models.limits import Wanted, check, check_prompt, limits_of
from align.models.results import SCORING
from align.models.sources import foreign
from align.recipe.errors import UserError, printable
from align.recipe.schema import BaseRecipe, Data
from align.training.run import Run

SHOWN = 3  # examples that --show prints


@dataclass(frozen=True)
class Session:
    """What every stage starts from."""

    recipe: BaseRecipe
    accelerator: Accelerator
    console: Console  # silent on all processes but the first
    fresh: bool
    show: bool

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.accelerator.is_main_process

    def begin(self, reading: Reading, room: int = 0, key: str = "") -> tuple[Run, Prepared] | None:
        """The run's folder and its data; None where there is nothing to train: after `--show`, or in a finished run.

        `room`: tokens that are sampled after each example, as the recipe's `key` says.
        """
        run = Run(self.recipe)
        run.check(self.fresh)
        with self.accelerator.main_process_first():  # the first fetches what is not there yet
            tokenizer = load_tokenizer(self.recipe.model)
        data = self.prepare(tokenizer, reading, room=room, key=key)
        if self.show:
            self.show_examples(data, tokenizer)
            return None
        return (run, data) if self.unfinished(run) else None

    def unfinished(self, run: Run) -> bool:
        """Whether there is something left to do; says so where there is not."""
        if run.finished and not self.fresh:
            self.say(f"{run.final} is already there: nothing to do (--fresh starts over)")
            return False
        return True

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reading: Reading,
        section: Data | None = None,
        room: int = 0,
        key: str = "",
    ) -> Prepared:
        """The run's data, or another section's; the first process tokenises, the others then find it in the cache.

        Raises UserError for what the model cannot take, before it is loaded.
        """
        recipe = self.recipe
        with self.accelerator.main_process_first(), counting(self.console) as progress:
            data = prepare(section or recipe.data, tokenizer, reading, recipe.seed, cache_folder(), progress)
        for line in data.summary:
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
