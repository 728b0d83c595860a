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
from align.models.demo import cache_folder
from align.recipe.errors import printable
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

    def begin(self, reading: Reading) -> tuple[Run, Prepared] | None:
        """The run's folder and its data; None where there is nothing to train: after `--show`, or in a finished run."""
        run = Run(self.recipe)
        run.check(self.fresh)
        with self.accelerator.main_process_first():  # the first fetches what is not there yet
            tokenizer = load_tokenizer(self.recipe.model)
        data = self.prepare(tokenizer, reading)
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

    def prepare(self, tokenizer: PreTrainedTokenizerBase, reading: Reading, section: Data | None = None) -> Prepared:
        """The run's data, or another section's; the first process tokenises, the others then find it in the cache."""
        recipe = self.recipe
        with self.accelerator.main_process_first(), counting(self.console) as progress:
            data = prepare(section or recipe.data, tokenizer, reading, recipe.seed, cache_folder(), progress)
        for line in data.summary:
            self.say(line)
        return data

    def say(self, line: str) -> None:
        """Print a line, with control characters spelt out."""
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def show_examples(self, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
        """What `--show` prints: the first examples of the first epoch, their trained tokens marked."""
        for i in data.train.order(self.recipe.seed, 0)[:SHOWN]:
            tree = data.train.tree(int(i))
            self.say(f"\n{data.train.where(int(i))} ({tree.packed_length} tokens, {tree.label_count} trained)")
            self.console.print(show(tree, tokenizer, colour=self.console.is_terminal), soft_wrap=True)
