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

import numpy as np
import torch
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.mixture import Prepared
from align.data.packing import pack, pack_padded
from align.data.trees import Forest, Tree, graft, plant
from align.models.decode import answer
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training.checkpoint import CheckpointWriter, published
from align.training.launch import signals
from align.training.meters import (
    Sums,
    Throughput,
    causal_attended,
    flops_per_token,
    matmul_params,
    mfu,
    peak_flops,
    peak_memory,
    perplexity,
)
from align.training.plan import Plan, learning_rate, row_budget
from align.training.report import write_report
from align.training.run import Run, open_trackers
from align.training.screen import Screen
from align.training.session import Session
from align.training.state import adamw, capture, restore, trained_parameters, whole

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]  # name -> (sum, count)
Loss = Callable[[nn.Module, Forest], tuple[Tensor, Metrics]]  # (trunk, batch) -> (summed loss, metrics with "loss")


def fit(session: Session, run: Run, trunk: Trunk, data: Prepared, loss: Loss) -> None:
    """Train to the end of the plan, or to a signal; leave `final/` and `report.html`."""
    try:
        Loop(session, run, trunk, data, loss).run_all()
    finally:
        run.close()


class Loop:
    """One training run; `fit` is its use."""

    def __init__(self, session: Session, run: Run, trunk: Trunk, data: Prepared, loss: Loss) -> None:
        self.session, self.run, self.trunk, self.data, self.loss = session, run, trunk, data, loss
        self.recipe, self.accelerator = session.recipe, session.accelerator
        self.plan = Plan(self.recipe, data.train)
        self.model, wrapped = self.accelerator.prepare(trunk, adamw(trunk, self.recipe.optim))
        self.optimizer, self.named = wrapped.optimizer, trained_parameters(self.model)
        self.writer = CheckpointWriter(run.checkpoints, self.recipe.train.keep)
        self.row_tokens = row_budget(self.recipe.batch.row_tokens, trunk.device)
        self.eval_rows = self._rows(data.eval, np.arange(len(data.eval)))
        self.step, self.tokens_seen, self.elapsed = 0, 0, 0.0
        self.saved = -1
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
        self._finish()

    def _train_step(self, screen: Screen, stop: bool) -> bool:
        """One optimizer step; whether any process was asked to stop."""
        step, started = self.step + 1, time.perf_counter()
        torch.manual_seed((self.recipe.seed << 20) + (step << 8) + self.accelerator.process_index)
        self.model.train()
        chosen = self.plan.batch(step)
        rows = self._rows(self.data.train, chosen)
        sums = Sums()
        for number, row in enumerate(rows, 1):
            with self.accelerator.no_sync(self.model) if number < len(rows) else nullcontext():
                batch = self._batch(self.data.train, row)
                total, metrics = self.loss(self.model, batch)
                self.accelerator.backward(total)
            sums.add("distinct", int((batch.tree >= 0).sum()) if row else 0)
            for name, (value, count) in metrics.items():
                sums.add(name, value, count)
        sums.add("stop", float(stop))
        merged = sums.merged(self.accelerator)
        means, (_, count) = merged.means(), merged.sums()["loss"]
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
        """Means over all held-out examples, whatever the batches; perplexity = exp(mean loss)."""
        examples = self.data.eval
        if not len(examples):
            return
        self.model.eval()
        sums, started = Sums(), time.perf_counter()
        with torch.no_grad():
            for row in screen.track(self.eval_rows, "evaluating"):
                _, metrics = self.loss(self.model, self._batch(examples, row))
                for name, (value, count) in metrics.items():
                    sums.add(name, value, count)
        merged = sums.merged(self.accelerator)
        record = {"step": self.step, "split": "eval", **merged.means()}
        if not math.isfinite(record["loss"]):
            if self.step:
                self._save()
                self._close()
            raise UserError(
                f"step {self.step}: the loss on the eval rows is not finite ({record['loss']}); check model.base, or "
                "start again in another run folder with a lower optim.learning_rate or in float32 (model.dtype=float32)"
            )
        record["perplexity"] = perplexity(*merged.sums()["loss"])
        record["eval_seconds"] = time.perf_counter() - started
        self._log(record, screen)

    def _samples(self, screen: Screen) -> None:
        """Answers to the recipe's prompts, before and after training; every process takes part (shards)."""
        log = self.recipe.log
        for prompt in screen.track(log.samples, "answering"):
            response = answer(self.trunk, prompt, log.sample_tokens, log.samples_as)
            if self.session.first:
                self.run.append("samples.jsonl", {"step": self.step, "prompt": prompt, "response": response})

    # -- batches -----------------------------------------------------------------------------------------------

    def _rows(self, examples: Examples, chosen: np.ndarray) -> list[list[int]]:
        """This process's share of the packed rows of `chosen`; every process has the same number."""
        world = self.accelerator.num_processes
        share = pack if self.trunk.packed else pack_padded
        rows = share([int(examples.lengths[i]) for i in chosen], self.row_tokens, multiple=world)
        return [[int(chosen[i]) for i in row] for row in rows[self.accelerator.process_index :: world]]

    def _batch(self, examples: Examples, row: list[int]) -> Forest:
        trees = [examples.tree(i) for i in row] or [_unlabelled(examples.tree(0))]
        if self.trunk.packed:
            trees = graft(trees)
        multiple = self.trunk.row_multiple if self.trunk.packed else 1
        return plant(trees, packed=self.trunk.packed, multiple=multiple).to(self.trunk.device)

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

    def _finish(self) -> None:
        self._save()
        result = {name: whole(p).detach().to("cpu") for name, p in self.named.items()}
        self._close()
        if self.session.first:  # last of all, for it says that the run is finished
            with published(self.run.final, sum(tensor.nbytes for tensor in result.values())) as beside:
                self.trunk.save(beside, result, self.recipe.stage)
        self.session.say(f"done: {self.run.final}; report: {self.run.folder / 'report.html'}")

    def _close(self) -> None:
        """Wait for the disk, then write summary and report."""
        if self.session.first:
            durable = self.writer.wait()
            for tracker in self.trackers:
                tracker.finish()
            self.run.summarise(self._summary(durable))
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
            f"{plan.epoch_size / plan.per_step:,.1f} steps an epoch, rows of up to {self.row_tokens:,} tokens"
        )

    def _log(self, record: dict, screen: Screen, quiet: bool = False) -> None:
        if not self.session.first:
            return
        screen.tell(record, quiet)
        if quiet:
            return
        self.run.append("metrics.jsonl", record)
        numbers = {f"{record['split']}/{k}": v for k, v in record.items() if k not in ("step", "split")}
        for tracker in self.trackers:
            tracker.log(numbers, step=record["step"])

    def _summary(self, durable: float) -> dict:
        trunk, meter = self.trunk, self.throughput
        name = torch.cuda.get_device_name() if trunk.device.type == "cuda" else "CPU"
        flops = flops_per_token(
            trunk.plain.config.get_text_config(),
            matmul_params(trunk.plain),
            causal_attended(self.data.train.lengths.tolist()),
            lora=trunk.adapted,
        )
        return {
            "steps": self.step,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.elapsed,
            "tokens_per_second": meter.tokens_per_second if meter.seconds else None,
            "model_flops_per_token": flops,
            "mfu": mfu(meter.tokens_per_second, flops, peak_flops(name, trunk.dtype)) if meter.seconds else None,
            "peak_memory_bytes": peak_memory(trunk.device),
            "save_blocking_seconds": getattr(self, "blocking_seconds", None),
            "save_durable_seconds": durable,
        }


def _unlabelled(tree: Tree) -> Tree:
    """A stand-in for a process without examples in this step: it computes along and adds nothing."""
    return Tree(tree.segments, tuple(np.zeros_like(trained) for trained in tree.trained))
