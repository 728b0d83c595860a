"""The training loop of every stage, on Accelerate.

A step's loss is the sum over all its labelled tokens (or pairs) on all processes, divided once by their global count:
gradients of sums are accumulated, and scaled when the count is known. So the number of processes and of packed rows
changes nothing but the time. What a step sees and does is a function of recipe and step alone, and a checkpoint holds
all that is not: weights, optimizer moments, step, and what the algorithm remembers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.data.trees import Forest
from align.models.decode import answer
from align.models.joined import prepare_products
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training.batches import Batches, Planted
from align.training.checkpoint import CheckpointWriter, published
from align.training.launch import signals
from align.training.meters import Sums, Throughput, costs
from align.training.plan import Plan, learning_rate
from align.training.report import write_report
from align.training.run import Run, open_trackers
from align.training.screen import Screen
from align.training.session import Session
from align.training.state import adamw, capture, restore, trained_parameters, whole

MILDER = "start again in another run folder with a lower optim.learning_rate or in float32 (model.dtype=float32)"
Metrics = dict[str, tuple[Tensor | float, Tensor | float]]  # name -> (sum, count), or vectors of them
Loss = Callable[[nn.Module, Forest], tuple[Tensor, Metrics]]  # (model, batch) -> (summed loss, metrics with "loss")
Work = tuple[Planted, list[int], Loss]  # a row of examples and what is to be learnt of it


class Learnt(NamedTuple):
    """What came of a step."""

    metrics: dict[str, Any]
    distinct: int  # tokens that were trained on, each once, over all processes
    tokens: int  # of the step's examples


class Algorithm(Protocol):
    """What a stage puts into the loop; each is called on every process."""

    def learn(self, loop: Loop, chosen: np.ndarray, rate: float) -> Learnt:
        """One step on the chosen examples, (k,) int64, at a learning rate."""

    def evaluate(self, loop: Loop) -> dict[str, Any]:
        """Figures of the held-out examples."""

    def conclude(self, loop: Loop) -> dict[str, Any]:
        """After the last step; what it returns stands in the result's align.json."""


class Loop:
    """One training run."""

    def __init__(
        self,
        session: Session,
        run: Run,
        trunk: Trunk,
        data: Prepared,
        algorithm: Algorithm,
        module: nn.Module | None = None,
        rates: dict[str, float] | None = None,
    ) -> None:
        """`module`: what is trained, if not the trunk alone; it has `save` as a trunk has.
        `rates`: part of a parameter's name -> its learning rate as a multiple of the recipe's; each such group is
        clipped by itself.
        """
        self.session, self.run, self.trunk, self.data, self.algorithm = session, run, trunk, data, algorithm
        self.recipe, self.accelerator = session.recipe, session.accelerator
        self.plan = Plan(self.recipe, data.train)
        self.module = module or trunk
        self.model, wrapped = self.accelerator.prepare(self.module, adamw(self.module, self.recipe.optim, rates or {}))
        self.optimizer, self.named = wrapped.optimizer, trained_parameters(self.model)
        self.model.train()
        self.writer = CheckpointWriter(run.checkpoints, self.recipe.train.keep)
        if not self.recipe.model.compile:  # a compiler makes its own products
            prepare_products(trunk)
        self.batches = Batches(trunk, self.accelerator, self.recipe.batch.row_tokens)
        self.step, self.tokens_seen, self.elapsed = 0, 0, 0.0
        self.memory: dict[str, Any] = {}  # what the algorithm has to know of earlier steps; JSON can hold it
        self.saved, self.blocking_seconds = -1, None
        self.throughput = Throughput(self.accelerator.num_processes)

    # -- the run -----------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Train to the end of the plan, or to a signal; leave `final/` and `report.html`."""
        try:
            self._run()
        finally:
            self.run.close()

    def _run(self) -> None:
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
                    self.save_state()
                if stop and self.step < self.plan.steps:
                    self._close()
                    session.say(
                        f"stopped by a signal after step {self.step} of {self.plan.steps}; "
                        "run the same command again to go on from there"
                    )
                    return
            self._samples(screen)
            about = self.algorithm.conclude(self)
        self._finish(about)

    def _train_step(self, screen: Screen, stop: bool) -> bool:
        """One step; whether any process was asked to stop."""
        step, started = self.step + 1, time.perf_counter()
        torch.manual_seed((self.recipe.seed << 20) + (step << 8) + self.accelerator.process_index)
        chosen = self.plan.batch(step)
        rate = learning_rate(self.recipe.optim, step, self.plan.steps)
        metrics, distinct, tokens = self.algorithm.learn(self, chosen, rate)
        self.step, seconds = step, time.perf_counter() - started
        self.tokens_seen += tokens
        self.elapsed += seconds
        self.throughput.add(distinct, len(chosen), seconds)
        record = {
            "step": step, "split": "train", **metrics,
            "epoch": self.plan.epoch(step), "tokens": tokens, "tokens_seen": self.tokens_seen,
            "step_seconds": seconds, "elapsed_seconds": self.elapsed,
            "tokens_per_second": distinct / seconds / self.accelerator.num_processes,
        }  # fmt: skip
        self._log(record, screen, quiet=bool(step % self.recipe.log.every and step < self.plan.steps))
        asked = torch.tensor(float(stop), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def gradients(self, work: Sequence[Work]) -> Sums:
        """Accumulate the gradient of this process's rows; metrics over all processes, `distinct` tokens among them."""
        sums = Sums()
        for number, (examples, row, loss) in enumerate(work, 1):
            with self.accelerator.no_sync(self.model) if number < len(work) else nullcontext():
                batch = self.batches.plant(examples, row)
                total, metrics = loss(self.model, batch)
                # A process without examples in this row computes along, and adds nothing.
                self.accelerator.backward(total if row else total * 0.0)
            sums.add("distinct", batch.distinct if row else 0)
            for name, (value, count) in metrics.items() if row else ():
                sums.add(name, value, count)
        return sums.merged(self.accelerator)

    def update(self, chosen: np.ndarray, rate: float, loss: float, count: float) -> dict[str, float]:
        """Step the optimizer with the accumulated gradients of a sum over `count`; their norms, group by group."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        # Accelerate averages gradients over processes; the loss is a sum over all of them.
        torch._foreach_mul_(gradients, self.accelerator.num_processes / max(count, 1.0))
        most = self.recipe.optim.max_grad_norm or math.inf
        groups: dict[str, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
            groups.setdefault(group["name"], []).extend(group["params"])
        norms = {
            f"grad_norm/{name}" if name else "grad_norm": float(whole(self.accelerator.clip_grad_norm_(params, most)))
            for name, params in groups.items()
        }
        self._guard(loss, max(norms.values(), key=lambda norm: norm if math.isfinite(norm) else math.inf), chosen)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms

    def _guard(self, loss: float, norm: float, chosen: np.ndarray) -> None:
        """Stop before the optimizer step if anything is not finite, with the last good state on disk."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.optimizer.zero_grad()
        self.save_state()
        self._close()
        what = "gradient" if math.isfinite(loss) else "loss"
        where = ", ".join(self.data.train.where(int(i)) for i in chosen[:8])
        raise UserError(
            f"step {self.step + 1}: the {what} is not finite (loss {loss}, gradient norm {norm}); the state after step "
            f"{self.step} is saved in {self.run.checkpoints}. Look at the step's examples "
            f"({where}{', …' if len(chosen) > 8 else ''}), or {MILDER}"
        )

    def _evaluate(self, screen: Screen) -> None:
        if not len(self.data.eval):
            return
        self.model.eval()
        started = time.perf_counter()
        record = {"step": self.step, "split": "eval", **self.algorithm.evaluate(self)}
        self.model.train()
        if not math.isfinite(record.get("loss", 0.0)):
            if self.step:
                self.save_state()
                self._close()
            raise UserError(
                f"step {self.step}: the eval rows' loss is not finite ({record['loss']}); check model.base, or {MILDER}"
            )
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

    def save_state(self) -> None:
        if self.saved == self.step:
            return
        tensors = capture(self.named, self.optimizer)
        state = {
            "step": self.step, "tokens_seen": self.tokens_seen, "elapsed_seconds": self.elapsed,
            "fingerprint": self.trunk.fingerprint, "memory": self.memory,
        }  # fmt: skip
        if self.session.first:
            self.blocking_seconds = self.writer.save(self.step, tensors, state)
        self.saved = self.step

    def _restore(self, path: Path) -> None:
        state = restore(path, self.named, self.optimizer, self.trunk.fingerprint)
        self.step = self.saved = state["step"]
        self.tokens_seen, self.elapsed = state["tokens_seen"], state["elapsed_seconds"]
        self.memory = state["memory"]

    def _finish(self, about: dict[str, Any]) -> None:
        self.save_state()
        self._close()
        self.publish(self.run.final, about)  # last of all, for it says that the run is finished
        self.session.say(f"done: {self.run.final}; report: {self.run.folder / 'report.html'}")

    def publish(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the result as it is now; with shards, every process must call it."""
        result = {name: whole(p).detach().to("cpu") for name, p in self.named.items()}
        if self.session.first:
            with published(folder, sum(tensor.nbytes for tensor in result.values())) as beside:
                self.module.save(beside, result, {"stage": self.recipe.stage, **about})

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
        for remark in trunk.remarks:
            say(remark)
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
