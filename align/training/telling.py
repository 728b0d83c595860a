"""What a run tells, on its screen, in its files and to trackers: before its first step, at each step, at its end."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from align.models.sampling.decode import answer
from align.training.costs import costs
from align.training.planning import forecast
from align.training.report.page import write_report
from align.training.runs.run import open_trackers

if TYPE_CHECKING:
    from align.training.loop import Loop

MOMENT, RARE = 5.0, 20  # the report is written after so many seconds at the soonest, and so many times what it takes


def introduce(loop: Loop) -> None:
    """What is going to be trained, on what, and for how long."""
    plan, trunk, say = loop.plan, loop.trunk, loop.session.say
    if loop.session.first:
        loop.trackers = open_trackers(loop.run)
    trained = sum(p.numel() for p in loop.learner.named.values())
    total = sum(p.numel() for p in loop.learner.model.parameters())
    say(
        f"{trunk.base_name} on {loop.accelerator.num_processes} x {trunk.device.type} ({torch.get_num_threads()} "
        f"threads), {str(trunk.dtype).removeprefix('torch.')}, {trunk.layout} layout; "
        f"{trained:,} of {total:,} parameters train"
    )
    for remark in trunk.remarks:
        say(remark)
    mean = float(loop.data.train.lengths.mean()) * plan.per_step
    say(
        f"{plan.shape} (about {mean:,.0f} tokens), {plan.epoch_size / plan.per_step:,.1f} steps an epoch, "
        f"rows of up to {loop.batches.row_tokens:,} tokens"
    )
    loop.forecast = forecast.forecast(loop)
    for line in forecast.told(loop, loop.forecast):
        say(line)


def log(loop: Loop, record: dict[str, Any], quiet: bool = False) -> None:
    """A record of metrics.jsonl; with `quiet`, only the bar on the screen moves."""
    if not loop.session.first:
        return
    loop.screen.tell(record, quiet)
    if quiet:
        return
    loop.run.append("metrics.jsonl", record)
    named = {k: v for k, v in record.items() if isinstance(v, int | float)}
    numbers = {f"{record['split']}/{k}": v for k, v in named.items() if k != "step"}
    for tracker in loop.trackers:
        tracker.log(numbers, step=record["step"])


def samples(loop: Loop) -> None:
    """Answers to the recipe's prompts, before and after training; every process takes part."""
    log = loop.recipe.log
    alone = loop.accelerator.num_processes == 1
    heed = loop.session.signals.heed if alone else None  # several stop together, between two prompts
    for prompt in loop.screen.track(log.samples, "answering"):
        with loop.trunk.whole():
            response = answer(loop.trunk, prompt, log.sample_tokens, log.samples_as, heed)
        if loop.session.first:
            loop.run.append("samples.jsonl", {"step": loop.step, "prompt": prompt, "response": response})


def place(loop: Loop) -> str:
    """How far the run is, in words."""
    return f"after step {loop.step} of {loop.plan.steps}" if loop.step else "before the first step"


class Page:
    """report.html of a run that goes on: written at evaluations, but no more often than that is cheap."""

    def __init__(self) -> None:
        self.written, self.took = time.monotonic(), 0.0

    def refresh(self, loop: Loop) -> None:
        """Write it, unless that was a moment ago."""
        if loop.session.first and time.monotonic() - self.written > max(MOMENT, RARE * self.took):
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            self.write(loop, f"This run goes on: this page is of step {loop.step} of {loop.plan.steps}, {now}.")

    def write(self, loop: Loop, state: str) -> None:
        """Write it; `state`: a sentence on how far the run is."""
        started = time.monotonic()
        write_report(loop.run.folder, state)
        self.written = time.monotonic()
        self.took = self.written - started


def close(loop: Loop, state: str = "") -> None:
    """Wait for the disk, then write summary and report; `state`: a sentence on how the run ended."""
    if loop.session.first:
        durable = loop.writer.wait()
        for tracker in loop.trackers:
            tracker.finish()
        done = {"steps": loop.step, "planned_steps": loop.plan.steps}
        cost = {**done, "tokens_seen": loop.tokens_seen, "train_seconds": loop.elapsed}
        saving = {"save_blocking_seconds": loop.blocking_seconds, "save_durable_seconds": durable}
        cost |= costs(loop.trunk, loop.throughput, loop.data.train.lengths) | forecast.outcome(loop, loop.forecast)
        if held := forecast.held(loop, loop.forecast):
            loop.session.say(held)
        loop.run.summarise(cost | saving)
        loop.page.write(loop, state or f"The run was left {place(loop)}; the same command goes on from there.")
    loop.accelerator.wait_for_everyone()
