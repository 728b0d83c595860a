"""Distillation: a student learns the whole distribution of a teacher, on what it says itself.

    accelerate launch -q -m align.distill recipes/distill.yaml

A step samples responses y to its prompts x from the student, and lowers, over the tokens of y,

    D(teacher(. | x, y_<t), student(. | x, y_<t))

for D the reverse or the forward KL divergence, or the generalised Jensen-Shannon divergence (Agarwal et al. 2023,
"On-policy distillation of language models", arXiv 2306.13649). A share of the prompts keeps the data's own answers
instead (`on_policy` below 1; at 0 it is classical distillation, Hinton et al. 2015, arXiv 1503.02531). The teacher is
another adapter on the student's trunk, or another model of the same vocabulary. Left out on purpose: a gradient
through what was sampled, as in the paper, and rewards beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.formats.prompts import prompts
from align.data.templates.render import conversations
from align.data.trees import Forest
from align.models.checkpoints.sources import speaking_of
from align.models.limits import Wanted, check, limits_of
from align.models.teacher import Student, Teacher, check_same_vocabulary, read_teacher
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.paths import Location
from align.recipe.schema import BaseRecipe, Model, PositiveInt, Section
from align.training.answers.section import AnsweringTrain
from align.training.launch import run_stage
from align.training.learner import Metrics
from align.training.loop import Learnt, Loop
from align.training.meters import Sums
from align.training.rollouts.engine import Drawing, Engine, engine_of
from align.training.rollouts.epochs import spent
from align.training.rollouts.rollout import Episodes, check_samples
from align.training.session import Session
from align.training.shards import held, let_go, load_trunk
from align.training.sources import titled, with_sources
from align.training.supervised import counted

SAMPLING = 5  # tells this stream of random numbers apart


class Taught(Section):
    """Who is learnt from."""

    adapter: Location | list[Location] | None = None
    """`final/` or `best/` of a run on the same trunk. With `base`: what is merged into that, as in `model.adapter`."""
    base: Location | None = None
    """Another model of the same vocabulary: a folder, a hub id or `demo/smollm2-135m`. It costs its own memory."""

    @model_validator(mode="after")
    def _is_there(self) -> Taught:
        if self.base is None and not isinstance(self.adapter, str):
            raise ValueError("name the teacher: one `adapter` on the same trunk, or another `base`")
        return self

    @property
    def results(self) -> dict[str, str]:
        """Recipe key -> what a run stands on besides its trunk."""
        named = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        found = {f"distill.teacher.adapter {name}": name for name in named if name}
        return found | ({"distill.teacher.base": self.base} if self.base else {})


class Distill(Section):
    """What the student learns of the teacher, and on which texts."""

    teacher: Taught
    """The model that the student learns from."""
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    """`reverse`, KL(student, teacher), settles on what the teacher finds likely; `forward`, KL(teacher, student),
    covers all of it; `jsd` lies between them."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Where between them `jsd` lies: near 0 as `forward`, near 1 as `reverse`."""
    on_policy: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the prompts that the student answers itself; the others keep the data's own answers."""
    samples: PositiveInt = 1
    """Responses of the student to each of its prompts; the prompt is computed once."""
    generation: Drawing = Field(default_factory=Drawing)
    """How they are drawn; the temperature divides the teacher's logits too."""


class Recipe(BaseRecipe):
    """A student from a teacher."""

    stage: Literal["distill"]
    """This stage."""
    train: AnsweringTrain = Field(default_factory=AnsweringTrain)
    distill: Distill

    @model_validator(mode="after")
    def _fits_distill(self) -> Recipe:
        if self.lora is None:
            raise ValueError("`lora: null`: the student is an adapter on the trunk; give a `lora` section")
        if self.model.add_tokens:
            raise ValueError("`model.add_tokens`: the teacher has no rows for them; train them in SFT first")
        if self.data.overlong == "truncate" and self.distill.on_policy == 1:
            raise ValueError("`data.overlong: truncate`: a prompt without its end asks something else; drop it")
        return self


def loss(student: nn.Module, batch: Forest) -> tuple[Tensor, Metrics]:
    """Sum of the divergences at all labels."""
    divergence = student(batch)
    return divergence.sum(), {"loss": (divergence.sum(), len(divergence))}


class Algorithm:
    """The step and the evaluation of distillation."""

    labels = None

    def __init__(self, recipe: Recipe, student: Student, engine: Engine | None) -> None:
        """`engine`: what the student samples by, where it does."""
        self.recipe, self.distill, self.student, self.engine = recipe, recipe.distill, student, engine

    def learn(self, loop: Loop, chosen: np.ndarray, rate: float) -> Learnt:
        """One step of distillation."""
        step, started, examples = loop.step + 1, time.perf_counter(), loop.data.train

        # 1. Which of the step's prompts the student answers: over the run, the recipe's share.
        place = loop.plan.place(loop.step) + np.arange(len(chosen) + 1)
        own = np.diff(np.floor(place * self.distill.on_policy)) > 0
        answered, asked = chosen[~own], chosen[own]
        # 2. Sample its responses.
        work, tokens, drawn = [], int(examples.lengths[answered].sum()), 0
        if len(asked):
            episodes = self._sampled(loop, examples, asked, (self.recipe.seed, SAMPLING, step))
            tokens, drawn = tokens + int(episodes.lengths.sum()), int(episodes.said.sum())
            work += [(episodes, row, loss) for row in loop.batches.rows(episodes, np.arange(len(asked)))]
        sampled_at = time.perf_counter()
        # 3. One optimizer step on these and on the data's own answers; the mean is over all their tokens.
        loop.screen.phase("learning")
        if len(answered):
            work += [(examples, row, loss) for row in loop.batches.rows(examples, answered)]
        sums = loop.gradients(work)
        total, count = sums.sums()["loss"]
        norms = loop.update(chosen, rate, total / max(count, 1), count)
        metrics = {"loss": total / max(count, 1), "on_policy": float(own.mean()), "learning_rate": rate, **norms}
        metrics |= spent(started, sampled_at, sampled_at, drawn)
        return Learnt(metrics, int(sums.sums()["distinct"][0]), tokens)

    def evaluate(self, loop: Loop) -> dict[str, Any]:
        """How far the student is from the teacher, on what it says to held-out prompts, and on their own answers."""
        examples, everyone = loop.data.eval, np.arange(len(loop.data.eval))
        compared: dict[str, Episodes | Examples] = {}
        if self.distill.on_policy > 0:
            compared["sampled"] = self._sampled(loop, examples, everyone, (self.recipe.seed, SAMPLING, 0))
        if self.distill.on_policy < 1:
            compared["answers"] = examples
        groups = titled(examples)
        sums = {
            title: {kind: self._compared(loop, each, chosen) for kind, each in compared.items()}
            for title, chosen in groups.items()
        }
        whole = {kind: Sums.of(each[kind] for each in sums.values()) for kind in compared}
        episodes = compared.get("sampled")
        return with_sources(
            _figures(whole, episodes, everyone),
            {title: _figures(sums[title], episodes, chosen) for title, chosen in groups.items() if title},
        )

    def _sampled(self, loop: Loop, examples: Examples, chosen: np.ndarray, key: tuple[int, ...]) -> Episodes:
        """The student's responses to prompts, (k,) int64; raises Stopped on a signal."""
        loop.screen.phase("sampling")
        stems = [asked_of(examples, int(i)) for i in chosen]
        keys = [(*key, place) for place in range(len(chosen))]
        return self.engine.sampled(loop, stems, keys, self.distill.samples)

    def _compared(self, loop: Loop, examples: Examples | Episodes, chosen: np.ndarray) -> Sums:
        """Sums over all tokens of examples, (k,) int64, whatever the batches."""
        sums = Sums()
        for row in loop.screen.track(loop.batches.rows(examples, chosen), "evaluating"):
            found = self.student.compared(loop.batches.plant(examples, row))
            for name, values in found._asdict().items() if row else ():
                sums.add(name, values.sum(), len(values))
        return sums.merged(loop.accelerator)

    def may_be_best(self, figures: dict[str, Any]) -> bool:
        """Any student may."""
        return True

    def described(self, loop: Loop, last: bool) -> dict[str, Any]:
        """What the result's align.json tells besides."""
        return {}


def _figures(sums: dict[str, Sums], episodes: Episodes | None, chosen: np.ndarray) -> dict[str, float]:
    """Means over the tokens of each kind of answers, and of all; and over the responses to prompts, (k,) int64."""
    found = {f"{name}/{kind}": mean for kind, each in sums.items() for name, mean in counted(each).items()}
    if episodes is not None:
        numbers = episodes.numbers(chosen)
        found["kl"] = sums["sampled"].sums()["reverse"][0] / len(numbers)
        found["response_tokens"] = float(episodes.said[numbers].float().mean())
        found["ended"] = float(episodes.ended[numbers].float().mean())
    return {"loss": Sums.of(sums.values()).means()["loss"], **found}


def asked_of(examples: Examples, i: int) -> np.ndarray:
    """The prompt of an example, (l,) int32: what stands before its answer, if it has one."""
    tree = examples.tree(i)
    ids, marks = tree.segments[0], tree.trained[0]
    return ids[: int(marks.argmax())] if marks.any() else ids


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe, distill = session.recipe, session.recipe.distill
    reading = prompts() if distill.on_policy == 1 else conversations("last", empty_thoughts=True)
    room = {"room": distill.generation.max_new, "key": "distill.generation.max_new"} if distill.on_policy else {}
    if not (begun := session.begin(reading, results=distill.teacher.results, **room)):
        return
    run, data, _ = begun
    trunk = load_trunk(session)
    if distill.on_policy:
        check_samples(trunk)
    if distill.teacher.base:
        teacher = _of_its_own(session, trunk, [Wanted(side, **room) for side in (data.train, data.eval)])
    else:
        key = "distill.teacher.adapter"
        teacher = Teacher.beside(trunk, read_teacher(distill.teacher.adapter, key, trunk), key, recipe.seed)
    student = Student(trunk, teacher, distill.divergence, distill.beta, distill.generation.temperature)
    engine = None
    if distill.on_policy:
        engine = engine_of(session, trunk, data, distill.generation, "distill.generation.engine")
    Loop(session, run, trunk, data, Algorithm(recipe, student, engine), student).run_all()


def _of_its_own(session: Session, trunk: Trunk, wanted: list[Wanted]) -> Teacher:
    """Another model as the teacher. Raises UserError where the two do not go together."""
    recipe, teacher, key = session.recipe, session.recipe.distill.teacher, "distill.teacher.base"
    shape = {name: getattr(recipe.model, name) for name in ("dtype", "quantize", "layout")}
    section = Model(base=teacher.base, adapter=teacher.adapter, **shape)
    with speaking_of(key):
        for remark in check(limits_of(section, trunk.tokenizer, None, False), trunk.tokenizer, wanted):
            session.say(f"teacher: {remark}")
        other = held(session, section, None, frozen=True).requires_grad_(False).eval()
    check_same_vocabulary(trunk, other, key)
    if other.layout != trunk.layout:
        raise UserError(
            f"{key}: {teacher.base} takes the {other.layout} layout, the student the {trunk.layout} one; set "
            "model.layout=padded, with distill.on_policy=0"
        )
    return Teacher(other, done=let_go)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run_stage(Recipe, "align.distill", train, argv)


if __name__ == "__main__":
    main()
