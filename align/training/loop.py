"""The training loop of every stage, on Accelerate.

A step's loss is the sum over all its labelled tokens (or pairs) on all processes, divided once by their global count:
gradients of sums are accumulated, and scaled when the count is known. So the number of processes and of packed rows
changes nothing but the time. What a step sees and does is a function of recipe and step alone, and a checkpoint holds
all that is not: weights, optimizer moments, step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.data.trees import Forest
from align.models.decode import answer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training.batches import Batches
from align.training.checkpoint import CheckpointWriter, published
from align.training.launch import signals
from align.training.meters import Sums, Throughput, costs
from align.training.plan import Plan, learning_rate
from align.training.report import write_report
from align.training.run import Run, open_trackers
from align.training.screen import Screen
from align.training.session import Session
from align.training.state import adamw, capture, restore, trained_parameters, whole

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]  # name -> (sum, count), or vectors of them
Loss = Callable[[nn.Module, Forest], tuple[Tensor, Metrics]]  # (trunk, batch) -> (summed loss, metrics with "loss")


class Hooks(NamedTuple):
    """What a stage adds to the loop; each is called on every process."""

    before: Callable[[Loop, Examples, np.ndarray], None] = lambda loop, examples, chosen: None
    """Before a step's or an evaluation's loss, with all its examples."""
    derive: Callable[[Sums], dict[str, Any]] = lambda sums: {}
    """What follows from the sums of a whole evaluation."""
    conclude: Callable[[Loop], dict[str, Any]] = lambda loop: {}
    """After the last step; what it returns stands in the result's align.json."""


def fit(
    session: Session,
    run: Run,
    trunk: Trunk,
    data: Prepared,
    loss: Loss,
    **hooks: Callable,
) -> None:
    """Train to the end of the plan, or to a signal; leave `final/` and `report.html`. `hooks`: those of `Hooks`."""
    try:
        Loop(session, run, trunk, data, loss, Hooks(**hooks)).run_all()
    finally:
        run.close()


class Loop:
    """One training run; `fit` is its use."""

    def __init__(
        self,
        session: Session,
        run: Run,
        trunk: Trunk,
        data: Prepared,
        loss: Loss,
        hooks: Hooks,
    ) -> None:
        self.session, self.run, self.trunk, self.data, self.loss = session, run, trunk, data, loss
        self.hooks = hooks
        self.recipe, self.accelerator = session.recipe, session.accelerator
        self.plan = Plan(self.recipe, data.train)
        self.model, wrapped = self.accelerator.prepare(trunk, adamw(trunk, self.recipe.optim))
        self.optimizer, self.named = wrapped.optimizer, trained_parameters(self.model)
        self.writer = CheckpointWriter(run.checkpoints, self.recipe.train.keep)
        self.batches = Batches(trunk, self.accelerator, self.recipe.batch.row_tokens)
        self.eval_rows = self.batches.rows(data.eval, np.arange(len(data.eval)))
        self.step, self.tokens_seen, self.elapsed = 0, 0, 0.0
        self.saved, self.blocking_seconds = -1, None
        self.throughput = Throughput(self.accelerator.num_processes)

    # -- the run -----------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        session, run = self.session, self.run
        point, passed_over = run.resume_point(session.fresh)
        for sentence in passed_over:
            session.say(sentence)
        if point:
            self._restore(point)
            session.say(f"going on from {point} (step {self.step} of {self.plan.steps})")
        if session.first:
            run.open(self.data, session.fresh, self.step)
            self.trackers = open_trackers(run)
        self.accelerator.wait_for_everyone()
        self._introduce()
        with signals() as asked, Screen(session.console, self.plan.steps, self.step) as screen:
            self.screen = screen
            if self.step == 0:
                self._evaluate(screen)
                self._samples(screen)
            while self.step < self.plan.steps:
                stop = self._train_step(screen, bool(asked))
                due = self.recipe.train.eval_every
                if self.step == self.plan.steps or (due and self.step % due == 0):
                    self._evaluate(screen)
                due = self.recipe.train.save_every
                if stop or self.step == self.plan.steps or (due and self.step % due == 0):
                    self._save()
                if stop and self.step < self.plan.steps:
                    self._close()
                    session.say(
                        f"stopped by a signal after step {self.step} of {self.plan.steps}; "
                        "run the same command again to go on from there"
                    )
                    return
            self._samples(screen)
            about = self.hooks.conclude(self)
        self._finish(about)

    def _train_step(self, screen: Screen, stop: bool) -> bool:
        """One optimizer step; whether any process was asked to stop."""
        step, started = self.step + 1, time.perf_counter()
        torch.manual_seed((self.recipe.seed << 20) + (step << 8) + self.accelerator.process_index)
        self.model.train()
        chosen = self.plan.batch(step)
        self.hooks.before(self, self.data.train, chosen)
        rows = self.batches.rows(self.data.train, chosen)
        sums = Sums()
        for number, row in enumerate(rows, 1):
            with self.accelerator.no_sync(self.model) if number < len(rows) else nullcontext():
                batch = self.batches.plant(self.data.train, row)
                total, metrics = self.loss(self.model, batch)
                # A process without examples in this row computes along, and adds nothing.
                self.accelerator.backward(total if row else total * 0.0)
            sums.add("distinct", self.batches.distinct(self.data.train, row, batch) if row else 0)
            for name, (value, count) in metrics.items() if row else ():
                sums.add(name, value, count)
        sums.add("stop", float(stop))
        merged = sums.merged(self.accelerator)
        means, (_, count) = _counted(merged), merged.sums()["loss"]
        asked, distinct = means.pop("stop") > 0, int(merged.sums()["distinct"][0])
        del means["distinct"]
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        # Accelerate averages gradients over processes; the loss is a sum over all of them.
        torch._foreach_mul_(gradients, self.accelerator.num_processes / max(count, 1.0))
        most = self.recipe.optim.max_grad_norm or math.inf
        norm = float(whole(self.accelerator.clip_grad_norm_(list(self.named.values()), most)))
        self._guard(step, means["loss"], norm, chosen)
        rate = learning_rate(self.recipe.optim, step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, seconds = step, time.perf_counter() - started
        tokens = int(self.data.train.lengths[chosen].sum())
        self.tokens_seen += tokens
        self.elapsed += seconds
        self.throughput.add(distinct, len(chosen), seconds)
        record = {
            "step": step, "split": "train", **means, "learning_rate": rate, "grad_norm": norm,
            "epoch": self.plan.epoch(step), "tokens": tokens, "tokens_seen": self.tokens_seen,
            "step_seconds": seconds, "elapsed_seconds": self.elapsed,
            "tokens_per_second": distinct / seconds / self.accelerator.num_processes,
        }  # fmt: skip
        self._log(record, screen, quiet=bool(step % self.recipe.log.every and step < self.plan.steps))
        return asked

    def _guard(self, step: int, loss: float, norm: float, chosen: np.ndarray) -> None:
        """Stop before the optimizer step if anything is not finite, with the last good state on disk."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.optimizer.zero_grad()
        self._save()
        self._close()
        what = "gradient" if math.isfinite(loss) else "loss"
        where = ", ".join(self.data.train.where(int(i)) for i in chosen[:8])
        raise UserError(
            f"step {step}: the {what} is not finite (loss {loss}, gradient norm {norm}); the state after step "
            f"{self.step} is saved in {self.run.checkpoints}. Look at the step's examples "
            f"({where}{', …' if len(chosen) > 8 else ''}), or start again in another run folder with a lower "
            "optim.learning_rate or in float32 (model.dtype=float32)"
        )

    def _evaluate(self, screen: Screen) -> None:
        """Means over all held-out examples, whatever the batches."""
        examples = self.data.eval
        if not len(examples):
            return
        self.model.eval()
        sums, started = Sums(), time.perf_counter()
        self.hooks.before(self, examples, np.arange(len(examples)))
        with torch.no_grad():
            for row in screen.track(self.eval_rows, "evaluating"):
                _, metrics = self.loss(self.model, self.batches.plant(examples, row))
                for name, (value, count) in metrics.items() if row else ():
                    sums.add(name, value, count)
        merged = sums.merged(self.accelerator)
        record = {"step": self.step, "split": "eval", **_counted(merged)}
        if not math.isfinite(record["loss"]):
            if self.step:
                self._save()
                self._close()
            raise UserError(
                f"step {self.step}: the loss on the eval rows is not finite ({record['loss']}); check model.base, or "
                "start again in another run folder with a lower optim.learning_rate or in float32 (model.dtype=float32)"
            )
        record |= self.hooks.derive(merged)
        record["eval_seconds"] = time.perf_counter() - started
        self._log(record, screen)

    def _samples(self, screen: Screen) -> None:
        """Answers to the recipe's prompts, before and after training; every process takes part (shards)."""
        log = self.recipe.log
        for prompt in screen.track(log.samples, "answering"):
            response = answer(self.trunk, prompt, log.sample_tokens, log.samples_as)
            if self.session.first:
                self.run.append("samples.jsonl", {"step": self.step, "prompt": prompt, "response": response})

    def each(
        self, examples: Examples, chosen: np.ndarray, function: Callable[[Trunk, Forest], Tensor], what: str
    ) -> list[Tensor]:
        """`Batches.each`, shown on this run's screen."""
        return self.batches.each(examples, chosen, function, self.screen, what)

    # -- state -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved == self.step:
            return
        tensors = capture(self.named, self.optimizer)
        state = {
            "step": self.step, "tokens_seen": self.tokens_seen, "elapsed_seconds": self.elapsed,
            "fingerprint": self.trunk.fingerprint,
        }  # fmt: skip
        if self.session.first:
            self.blocking_seconds = self.writer.save(self.step, tensors, state)
        self.saved = self.step

    def _restore(self, path: Path) -> None:
        state = restore(path, self.named, self.optimizer, self.trunk.fingerprint)
        self.step = self.saved = state["step"]
        self.tokens_seen, self.elapsed = state["tokens_seen"], state["elapsed_seconds"]

    def _finish(self, about: dict[str, Any]) -> None:
        self._save()
        result = {name: whole(p).detach().to("cpu") for name, p in self.named.items()}
        self._close()
        if self.session.first:  # last of all, for it says that the run is finished
            with published(self.run.final, sum(tensor.nbytes for tensor in result.values())) as beside:
                self.trunk.save(beside, result, {"stage": self.recipe.stage, **about})
        self.session.say(f"done: {self.run.final}; report: {self.run.folder / 'report.html'}")

    def _close(self) -> None:
        """Wait for the disk, then write summary and report."""
        if self.session.first:
            durable = self.writer.wait()
            for tracker in self.trackers:
                tracker.finish()
            cost = {"steps": self.step, "tokens_seen": self.tokens_seen, "train_seconds": self.elapsed}
            saving = {"save_blocking_seconds": self.blocking_seconds, "save_durable_seconds": durable}
            self.run.summarise(cost | costs(self.trunk, self.throughput, self.data.train.lengths) | saving)
            write_report(self.run.folder)
        self.accelerator.wait_for_everyone()

    # -- telling -----------------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        plan, trunk, say = self.plan, self.trunk, self.session.say
        trained = sum(p.numel() for p in self.named.values())
        total = sum(p.numel() for p in self.model.parameters())
        say(
            f"{trunk.base_name} on {self.accelerator.num_processes} x {trunk.device.type} ({torch.get_num_threads()} "
            f"threads), {str(trunk.dtype).removeprefix('torch.')}, {trunk.layout} layout; "
            f"{trained:,} of {total:,} parameters train"
        )
        if trunk.layout_reason:
            say(f"padded layout, for {trunk.layout_reason}")
        mean = float(self.data.train.lengths.mean()) * plan.per_step
        say(
            f"{plan.steps:,} steps of {plan.per_step} examples (about {mean:,.0f} tokens), "
            f"{plan.epoch_size / plan.per_step:,.1f} steps an epoch, rows of up to {self.batches.row_tokens:,} tokens"
        )

    def _log(self, record: dict, screen: Screen, quiet: bool = False) -> None:
        if not self.session.first:
            return
        screen.tell(record, quiet)
        if quiet:
            return
        self.run.append("metrics.jsonl", record)
        named = {k: v for k, v in record.items() if isinstance(v, int | float)}
        numbers = {f"{record['split']}/{k}": v for k, v in named.items() if k != "step"}
        for tracker in self.trackers:
            tracker.log(numbers, step=record["step"])


def _counted(sums: Sums) -> dict[str, float | list[float | None]]:
    """The means of what was there: a step may have no undesirable answer."""
    counts = sums.sums()
    return {name: mean for name, mean in sums.means().items() if name not in counts or counts[name][1]}
