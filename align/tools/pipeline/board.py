"""What a running pipeline shows: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from align.recipe.errors import printable
from align.tools.pipeline.jobs import Job
from align.tools.pipeline.stage import Stage

TELL_EVERY = 30.0  # seconds between lines about one job, off a terminal
STYLES = {"waiting": "dim", "running": "bold", "failed": "bold red", "held back": "red", "stopped": "yellow"}


class Board:
    """The stages of a pipeline and how far they are. `states` is what the pipeline keeps of them."""

    def __init__(self, console: Console, stages: Sequence[Stage], states: Mapping[str, str]) -> None:
        self.console, self.stages, self.states = console, stages, states
        self.jobs: Sequence[Job] = ()
        self.seconds: dict[str, float] = {}
        self.told: dict[str, float] = {}
        self.live = Live(console=console, get_renderable=self.table, refresh_per_second=2, transient=True)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.live.stop()

    def say(self, line: str) -> None:
        """Print a line, as it is; above the table where there is one."""
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def show(self, jobs: Sequence[Job]) -> None:
        """These jobs are running now."""
        self.jobs = list(jobs)
        for job in () if self.console.is_terminal else self.jobs:
            if time.monotonic() - self.told.get(job.stage.name, job.begun) > TELL_EVERY:
                self.told[job.stage.name] = time.monotonic()
                at = "step {} of {}, ".format(*progress) if (progress := job.progress()) else ""
                self.say(f"{job.stage.name}: {at}{job.seconds:.0f} s")

    def table(self) -> Table:
        """A line for each stage; of a sweep one for all its points, and one for each that is running or failed."""
        table = Table("stage", "state", "progress", "time", box=None, padding=(0, 2, 0, 0), header_style="dim")
        running = {job.stage.name: job for job in self.jobs}
        sweeps: dict[str, list[Stage]] = {}
        for stage in self.stages:
            sweeps.setdefault(stage.name.partition("[")[0], []).append(stage)
        for name, points in sweeps.items():
            shown = points
            if points[0].label:
                done = sum(self.states[point.name] in ("finished", "skipped") for point in points)
                seconds = sum(self.seconds.get(point.name, 0) for point in points)
                table.add_row(name, f"{done} of {len(points)} finished", bar(done, len(points)), spell(seconds))
                shown = [point for point in points if self.states[point.name] in ("running", "failed", "stopped")]
            for point in shown:
                job, state = running.get(point.name), self.states[point.name]
                progress = job.progress() if job else None
                seconds = job.seconds if job else self.seconds.get(point.name, 0)
                indent = "  " if point.label else ""
                cells = (Text(indent + point.name), state, bar(*progress) if progress else "", spell(seconds))
                table.add_row(*cells, style=STYLES.get(state, ""))
        return table


def bar(done: int, total: int) -> Table:
    """A bar with its figures."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total, done, width=20), f"{done}/{total}")
    return grid


def spell(seconds: float) -> str:
    """1:02:03, or nothing for no time at all."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return "" if not whole else f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
