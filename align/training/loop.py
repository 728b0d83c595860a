"""The training loop of every stage, on Accelerate.

A step's loss is the sum over all its labelled tokens (or pairs) on all processes, divided once by their global count:
gradients of sums are accumulated, and scaled when the count is known. So the number of processes and of packed rows
changes nothing but the time. What a step sees and does is a function of recipe and step alone, and a checkpoint holds
all that is not: weights, optimizer moments, step, and what the algorithm remembers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.data.trees import Forest
from align.models import acceleration
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training import best, telling
from align.training.answers.answers import Answers
from align.training.batches import Batches
from align.training.borders.stops import Stopped
from align.training.learner import Work
from align.training.learners import learner_of
from align.training.meters import Sums, Throughput
from align.training.plan import Plan, learning_rate
from align.training.planning.forecast import planned_rows
from align.training.runs.checkpoint import CheckpointWriter
from align.training.runs.durable import published
from align.training.runs.run import Run
from align.training.runs.start import find_start, start_from, terms_of
from align.training.runs.state import kept_portions, restore
from align.training.screen import Screen
from align.training.session import Session
from align.training.shards import let_go

if TYPE_CHECKING:
    from align.training.algorithm import Algorithm

LONG = 60.0  # seconds of an evaluation before which a checkpoint is due
MILDER = "start again in another run folder with a lower optim.learning_rate or in float32 (model.dtype=float32)"


class Learnt(NamedTuple):
    """What came of a step."""

    metrics: dict[str, Any]
    distinct: int  # tokens that were trained on, each once, over all processes
    tokens: int  # of the step's examples


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
        self.plan = Plan(self.recipe, data.train, run.standing.step, run.standing.place)
        generate = getattr(self.recipe.train, "generate", None)
        self.answers = Answers(generate, data.prompts, trunk, self.recipe.seed) if data.prompts else None
        self.learner = learner_of(session, trunk, module or trunk, rates or {})
        self.writer = CheckpointWriter(run.checkpoints, self.recipe.train.keep)
        acceleration.for_training(trunk)
        trunk.budgets = trunk.budgets.asked(self.recipe.batch.cache_tokens)
        self.batches = Batches(trunk, self.accelerator, planned_rows(self))
        self.step, self.tokens_seen, self.elapsed = 0, 0, 0.0
        self.memory: dict[str, Any] = {}  # what the algorithm has to know of earlier steps; JSON can hold it
        self.saved, self.blocking_seconds, self.eval_seconds = -1, None, 0.0
        self.throughput = Throughput(self.accelerator.num_processes)
        self.trackers: list[GeneralTracker] = []
        self.page = telling.Page()

    def run_all(self) -> None:
        """Train to the end of the plan, or to a signal; leave `final/` and `report.html`."""
        self._begin()
        with self.session.signals.deferred(), Screen(self.session.console, self.plan.steps, self.step) as screen:
            self.screen = screen
            screen.heed = self.session.heed
            if self.accelerator.num_processes == 1:  # several stop together, between two rows
                screen.at_once = self.session.signals.at_once
            try:
                self._train()
                about = self.algorithm.described(self, last=True)
            except Stopped:
                self._stop()
            else:
                self._finish(about)

    def _begin(self) -> None:
        """The state to go on from, and the folder made ready."""
        session, run, standing = self.session, self.run, self.run.standing
        for sentence in standing.said:
            session.say(sentence)
        if standing.point:
            self._restore(standing.point)
            session.say(f"going on from {standing.point} (step {self.step} of {self.plan.steps})")
        elif name := self.recipe.train.start_from:
            start = session.decided(lambda: find_start(name))
            session.say(
                start_from(start, self.trunk, self.learner.named, self.learner.optimizer, self.algorithm.labels)
            )
        session.decided(lambda: run.open(self.data, session.fresh, self.plan.steps, session.say))
        self.learner.begin()
        telling.introduce(self)

    def _train(self) -> None:
        """Step by step; an evaluation at a step comes after its checkpoint, and is done anew where a run goes on."""
        evaluate = self._evaluation_due() or self.run.standing.evaluated
        while True:
            if evaluate:
                self._evaluate()
            ends = self.step == self.plan.steps or best.over(self)
            if ends or self.step == 0:
                telling.samples(self)
            if ends:
                return
            self._train_step()
            self.session.heed()
            evaluate, every = self._evaluation_due(), self.recipe.train.save_every
            due = self.step == self.plan.steps or bool(every and self.step % every == 0)
            if due or (evaluate and self.session.decided(lambda: self.eval_seconds > LONG)):
                self.save_state()

    def _evaluation_due(self) -> bool:
        every = self.recipe.train.eval_every
        return self.step in (0, self.plan.steps) or bool(every and self.step % every == 0)

    @contextmanager
    def leaving_off(self) -> Iterator[None]:
        """Around what a step needs from elsewhere. Where that raises UserError, in all processes, the state before the
        step is saved first."""
        try:
            yield
        except UserError as error:
            self._leave_off(f"ended with an error {telling.place(self)}")
            saved = f"; the state after step {self.step} is saved: run the same command again to resume"
            raise UserError(*error.problems[:-1], error.problems[-1] + saved * bool(self.step)) from error

    def _leave_off(self, how: str) -> None:
        """Leave what is needed to go on: the state after the last step; `how` the run ended, for its page."""
        if self.step:
            self.save_state()
        telling.close(self, f"The run {how}.")

    def _stop(self) -> None:
        stopped = f"stopped by a signal {telling.place(self)}; run the same command again to go on from there"
        self._leave_off(f"was {stopped}")
        self.session.say(stopped)

    def _train_step(self) -> None:
        """One step."""
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
        telling.log(self, record, quiet=bool(step % self.recipe.log.every and step < self.plan.steps))

    def gradients(self, work: Sequence[Work]) -> Sums:
        """Accumulate the gradient of this process's rows; metrics over all processes, `distinct` tokens among them."""
        return self.learner.gradients(self.batches, work)

    def update(self, chosen: np.ndarray, rate: float, loss: float, count: float) -> dict[str, float]:
        """Step the optimizer with the accumulated gradients of a sum over `count`; their norms, group by group."""
        norms = self.learner.clipped(rate, count)
        self._guard(loss, max(norms.values(), key=lambda norm: norm if math.isfinite(norm) else math.inf), chosen)
        self.learner.step()
        return norms

    def _guard(self, loss: float, norm: float, chosen: np.ndarray) -> None:
        """Stop before the optimizer step if anything is not finite, with the last good state on disk."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "gradient" if math.isfinite(loss) else "loss"
        where = ", ".join(self.data.train.where(int(i)) for i in chosen[:8])
        self.give_up(
            f"step {self.step + 1}: the {what} is not finite (loss {loss}, gradient norm {norm}); the state after step "
            f"{self.step} is saved in {self.run.checkpoints}. Look at the step's examples "
            f"({where}{', …' if len(chosen) > 8 else ''}), or {MILDER}"
        )

    def give_up(self, *problems: str) -> NoReturn:
        """End a run that cannot go on with the state after the last step on the disk; every process must call it."""
        self.learner.forget()
        self.save_state()
        self._leave_off(f"ended with an error {telling.place(self)}")
        raise UserError(*problems)

    def _evaluate(self) -> None:
        answering = self.answers is not None and self.answers.due(self)
        if not (len(self.data.eval) or answering):
            return
        self.learner.model.eval()
        started, record = time.perf_counter(), {"step": self.step, "split": "eval"}
        if len(self.data.eval):
            record |= self.algorithm.evaluate(self)
        if answering:
            record |= self.answers.evaluated(self)
        self.learner.model.train()
        let_go(self.trunk)
        if not math.isfinite(record.get("loss", 0.0)):
            why = f"the eval rows' loss is not finite ({record['loss']}); check model.base, or {MILDER}"
            if self.step:
                self.give_up(f"step {self.step}: {why}")
            raise UserError(f"step 0: {why}")
        best.judged(self, record, answering)
        record["eval_seconds"] = self.eval_seconds = time.perf_counter() - started
        telling.log(self, record)
        self.page.refresh(self)

    def each(
        self, examples: Examples, chosen: np.ndarray, function: Callable[[Trunk, Forest], Tensor], what: str
    ) -> list[Tensor]:
        """`Batches.each`, shown on this run's screen."""
        return self.batches.each(examples, chosen, function, self.screen, what)

    def save_state(self) -> None:
        """A checkpoint of now, unless there is one; with shards, every process must call it."""
        if self.saved == self.step:
            return
        if self.session.first:
            self.writer.begin()
        tensors = self.learner.captured()
        state = {
            "step": self.step, "place": self.plan.place(self.step), "tokens_seen": self.tokens_seen,
            "elapsed_seconds": self.elapsed, "memory": self.memory, "identity": self.run.identity,
            "portions": {"row_tokens": self.batches.row_tokens, **self.trunk.budgets._asdict()},
            **terms_of(self.trunk, self.algorithm.labels),
        }  # fmt: skip
        if self.session.first:
            self.blocking_seconds = self.writer.save(self.step, tensors, state)
        self.saved = self.step

    def _restore(self, path: Path) -> None:
        state = restore(path, self.learner.named, self.learner.optimizer, self.trunk.fingerprint)
        self.step = self.saved = state["step"]
        self.tokens_seen, self.elapsed, self.memory = (state[k] for k in ("tokens_seen", "elapsed_seconds", "memory"))
        self._keep_portions(state["portions"])

    def _keep_portions(self, before: dict[str, int]) -> None:
        """Work in the portions of before: others would round otherwise. What there is no room for now is smaller."""
        now = {"row_tokens": self.batches.row_tokens, **self.trunk.budgets._asdict()}
        kept, less = kept_portions(now, before)
        if less:
            self.session.say(less)
        self.batches.row_tokens = kept.pop("row_tokens")
        self.trunk.budgets = self.trunk.budgets._replace(**kept)

    def _finish(self, about: dict[str, Any]) -> None:
        self.save_state()
        early = best.in_words(self) if self.step < self.plan.steps else None
        telling.close(self, early or f"The run is finished: {self.step} steps.")
        self.publish(self.run.final, about | best.told(self))  # last of all, for it says that the run is finished
        if early:
            self.session.say(early)
        self.session.say(f"done: {self.run.final}; report: {self.run.folder / 'report.html'}")

    def publish(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the result as it is now; every process must call it."""
        result, told = self.learner.result(), {"stage": self.recipe.stage, "step": self.step, **about}

        def write() -> None:
            with published(folder, sum(tensor.nbytes for tensor in result.values())) as beside:
                self.learner.module.save(beside, result, told)

        self.session.decided(write)
