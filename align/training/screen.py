"""What a running stage shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align.recipe.errors import printable

T = TypeVar("T")
NAMES = {"learning_rate": "lr", "tokens_per_second": "tok/s", "grad_norm": "norm"}
HIDDEN = {
    "step", "split", "epoch", "tokens", "tokens_seen", "clip_fraction/value", "updates", "value/return",
    "value/critic", "learning_rate/critic", "sampled_tokens_per_second",
}  # fmt: skip


class Screen:
    """Progress of one run; silent where the console is."""

    def __init__(self, console: Console, steps: int | None = None, done: int = 0) -> None:
        self.console, self.steps = console, steps
        self.heed: Callable[[], None] = lambda: None  # called between items; what it raises ends the tracking
        self.at_once: Callable[[], AbstractContextManager] = nullcontext  # around what a signal may break off anywhere
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        hidden = console.quiet or not console.is_terminal
        self.bars = Progress(*columns, console=console, disable=hidden, transient=True)
        if steps is not None:
            self.main = self.bars.add_task("training", total=steps, completed=done)

    def __enter__(self) -> Screen:
        self.bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.bars.stop()

    def tell(self, record: dict[str, Any], quiet: bool) -> None:
        """A record of metrics.jsonl as a line; with `quiet`, only the bar moves."""
        if record["split"] == "train":
            self.bars.update(self.main, completed=record["step"])
        if not quiet:
            shown = {
                name: number
                for name, number in record.items()
                if name not in HIDDEN and not name.endswith("_seconds") and isinstance(number, int | float)
            }
            numbers = " ".join(f"{NAMES.get(k, k)} {v:.4g}" for k, v in shown.items())
            line = f"{record['split']:5} step {record['step']}/{self.steps} {numbers}"
            self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def phase(self, doing: str) -> None:
        """What the step at hand is at, on the main bar."""
        self.bars.update(self.main, description=doing)

    def track(self, items: Sequence[T], doing: str) -> Iterator[T]:
        """Go through items with a bar of their own; off a terminal, a line every 30 s."""
        with self.counting(len(items), doing) as one_more:
            for item in items:
                self.heed()
                yield item
                one_more()

    @contextmanager
    def counting(self, total: int, doing: str) -> Iterator[Callable[[], None]]:
        """A bar of its own, which each call of what it gives moves on by one; off a terminal, a line every 30 s."""
        task, done, told = self.bars.add_task(doing, total=total), 0, time.monotonic()

        def one_more() -> None:
            nonlocal done, told
            done += 1
            self.bars.advance(task)
            if not self.console.is_terminal and time.monotonic() - told > 30:
                told = time.monotonic()
                self.console.print(f"{doing}: {done} of {total}", markup=False, highlight=False)

        try:
            yield one_more
        finally:
            self.bars.remove_task(task)
