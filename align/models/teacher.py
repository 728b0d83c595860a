"""A teacher whose distribution a student learns: another adapter on the student's trunk, or another model of the same
vocabulary. The student's own adapter starts at zero.

Shapes: n labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.data.trees import Forest
from align.models.checkpoints.adapters import put, stands_on, stranger
from align.models.checkpoints.results import SCORING, Result, read_result
from align.models.lora import check_targets, lora_config
from align.models.trunk import Trunk
from align.objectives.divergences import Compared, Head, Measure, linear_comparison, linear_divergence
from align.recipe.errors import UserError

TEACHER = "teacher"


def read_teacher(name: str, key: str, trunk: Trunk) -> Result:
    """A result that learnt to answer on this trunk; UserError, which names the `key`, for any other."""
    result = read_result(name, key, "a finished run that trained a LoRA")
    if result.about.stage in SCORING:
        raise UserError(f"{key}: {result.folder} is a result of stage {result.about.stage}, which only scores texts")
    if not stands_on(result, trunk):
        told = stranger(result, trunk, "the trunk of this run")
        raise UserError(f"{key}: {told}; or name its base as `distill.teacher.base`")
    if result.config.tokens:
        raise UserError(f"{key}: {result.folder} brings rows of added tokens of its own, which the student has not")
    return result


def check_same_vocabulary(trunk: Trunk, teacher: Trunk, key: str) -> None:
    """UserError unless every token of the student's tokenizer is the same number to the teacher."""
    here, there = trunk.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    for token, number in sorted(here.items(), key=lambda item: item[1]):
        if (other := there.get(token)) != number:
            what = "is unknown to it" if other is None else f"is number {other} to it"
            raise UserError(
                f"{key}: {teacher.base_name} has another vocabulary than {trunk.base_name}: the token {token!r}, "
                f"number {number}, {what}; take a teacher of the same tokenizer"
            )
    if (most := max(here.values())) >= teacher.rows:
        raise UserError(f"{key}: {teacher.base_name} has rows for {teacher.rows} tokens, not for number {most}")


class Teacher:
    """What it says of the labels of a batch, without gradient."""

    def __init__(
        self, trunk: Trunk, role: str | None = None, done: Callable[[Trunk], None] = lambda trunk: None
    ) -> None:
        """`role`: its adapter on the student's trunk; None: a trunk of its own, with which `done` does what is to be
        done after each reading."""
        self.trunk, self.role, self.done = trunk, role, done

    @classmethod
    def beside(cls, trunk: Trunk, result: Result, key: str, seed: int = 0) -> Teacher:
        """The adapter of a result, put on the student's trunk; it is frozen there."""
        section = result.config.section
        check_targets(trunk.plain, section)
        with torch.random.fork_rng(), trunk.whole() if section.dora else nullcontext():
            torch.manual_seed(seed)
            trunk.causal.add_adapter(TEACHER, lora_config(section, trunk.plain))
        put(trunk.causal, result.weights, TEACHER, f"{key}: {result.folder}")
        trunk.take_in()
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_("default" in name.split(".") and "lora" in name)
        return cls(trunk, TEACHER)

    @contextmanager
    def reading(self, forest: Forest, temperature: float) -> Iterator[tuple[Tensor, Head]]:
        """Final hidden states (n, e), and what makes logits of them, which is only to be used within."""
        with torch.no_grad(), self.trunk.acting(self.role) if self.role else nullcontext():
            found = self.trunk.states(forest), _head(self.trunk, temperature)
        yield found
        self.done(self.trunk)


class Student(nn.Module):
    """The student's adapter on its trunk, measured by the teacher."""

    def __init__(self, trunk: Trunk, teacher: Teacher, measure: Measure, beta: float, temperature: float) -> None:
        super().__init__()
        self.trunk, self.teacher = trunk, teacher  # the latter is no module: nothing of it is trained or saved
        self.measure, self.beta, self.temperature = measure, beta, temperature

    def forward(self, forest: Forest) -> Tensor:
        """The divergence of its distribution from the teacher's at every label, (n,) float32, in nats."""
        with self.teacher.reading(forest, self.temperature) as other:
            own = self.trunk.states(forest), _head(self.trunk, self.temperature)
            return linear_divergence(*own, *other, self.measure, self.beta, self.trunk.budgets.logits_bytes)

    @torch.no_grad()
    def compared(self, forest: Forest) -> Compared:
        """The same, and both KL divergences, (n,) float32 each, without gradient."""
        with self.teacher.reading(forest, self.temperature) as other:
            own = self.trunk.states(forest), _head(self.trunk, self.temperature)
            return linear_comparison(*own, *other, self.measure, self.beta, self.trunk.budgets.logits_bytes)

    def saved(self) -> dict[str, nn.Parameter]:
        """What a result holds, by name: the student's adapter."""
        return {f"trunk.{name}": p for name, p in self.trunk.saved().items()}

    def save(self, folder: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        """As `Trunk.save` writes it."""
        self.trunk.save(folder, {name.removeprefix("trunk."): tensor for name, tensor in weights.items()}, about)


def _head(trunk: Trunk, temperature: float) -> Head:
    projection = trunk.projection(temperature)
    return Head(*(projection[name] for name in Head._fields))
