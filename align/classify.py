"""Classifier heads: tell texts apart, such as spam from ham, with a few trained weights on a frozen trunk.

    accelerate launch -q -m align.classify recipes/spam.yaml
    python -m align.classify --predict runs/spam/final FILE

For a text x of class y, with a linear head W on the hidden state h of its last token, the loss is the mean over the
step's texts of

    -w_y log softmax(W h(x))_y

with a LoRA (arXiv 2106.09685), or with the last blocks, the head alone or all weights, as in Raschka, *Build a Large
Language Model (From Scratch)*, chapter 6. w is 1, or each class's inverse share. Encoders (BERT-like) read the text in
both directions under a head of their own. Left out on purpose: several labels for one text, and regression.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from align.data.examples import Examples
from align.data.formats.classes import Sides, class_numbers, counts, find_labels, prepare_classes
from align.data.mixture import counting
from align.data.trees import Forest
from align.models.demo import cache_folder
from align.models.limits import Wanted
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.recipe.records import to_json
from align.recipe.schema import BaseRecipe, Eval, Fraction, PositiveInt, Section
from align.training.borders.foreign import foreign
from align.training.borders.processes import first_then_others
from align.training.labelling.measures import (
    at_threshold,
    measured,
    mistakes,
    outcome,
    softmax,
    threshold_for,
    threshold_of_best_f1,
)
from align.training.labelling.predict import predict_command
from align.training.launch import run_stage
from align.training.learner import Metrics
from align.training.loop import Loop
from align.training.meters import Sums, interval
from align.training.runs.durable import write_atomic
from align.training.session import SHOWN, Session
from align.training.shards import load_trunk
from align.training.supervised import fit

RESULTS, MISTAKES = "classification.json", 50  # for the report; of each side


class Classify(Section):
    """Which classes there are, and what trains to tell them apart."""

    labels: list[str] | None = None
    """The labels, in the order of their class numbers; of two, the second is the positive one. Default: all labels of
    `data.train`, sorted."""
    train: Literal["lora", "last_blocks", "head", "all"] = "lora"
    """What trains beside the head: a LoRA on all blocks, the last `blocks` blocks with the final norm, nothing, or
    every weight. All but `lora` need `lora: null`."""
    blocks: PositiveInt | None = None
    """How many blocks `last_blocks` trains (default: 1)."""
    balance: Literal["none", "weights", "undersample"] = "none"
    """`weights`: each text counts by the inverse share of its class; `undersample`: of every class as many texts as the
    rarest has, a seeded choice made before the split."""
    label_smoothing: Fraction = 0.0
    """This share of each target is spread over all classes (Szegedy et al. 2016, arXiv 1512.00567)."""
    test: Eval = Field(default_factory=Eval)
    """Rows to test on once, after training: a share of all rows, or sources of their own."""
    precision: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of two classes: the precision wanted of the positive one. The threshold with the most recall at that precision on
    the eval rows is saved, tested, and used by `--predict`."""
    threshold: Literal["best_f1"] | None = None
    """Of two classes, in place of `precision`: the threshold with the best F1 of the positive one on the eval rows."""

    @model_validator(mode="after")
    def _fits_together(self) -> Classify:
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError("`labels` needs two or more, each once")
        if self.labels is not None and any(not label or label != label.strip() for label in self.labels):
            raise ValueError("`labels` may not be empty or begin or end with white space")
        if self.blocks and self.train != "last_blocks":
            raise ValueError("`blocks` needs `train: last_blocks`")
        for name in ("precision", "threshold"):
            if getattr(self, name) and self.labels is not None and len(self.labels) > 2:
                raise ValueError(f"`{name}` needs two classes")
        if self.precision and self.threshold:
            raise ValueError("`precision` and `threshold` each choose the threshold: give one")
        return self


class Recipe(BaseRecipe):
    """A classifier of texts."""

    stage: Literal["classify"]
    """This stage."""
    classify: Classify = Field(default_factory=Classify)

    @model_validator(mode="after")
    def _classifies(self) -> Recipe:
        wanted = self.classify.train
        if wanted == "lora" and self.lora is None:
            raise ValueError("without a LoRA, set `classify.train` to last_blocks, head or all")
        if wanted != "lora" and self.lora is not None:
            raise ValueError(f"`classify.train: {wanted}` trains the base's own weights: set `lora: null`")
        if self.log.samples:
            raise ValueError("a classifier writes no answers: leave `log.samples` out")
        if self.data.eval.fraction + self.classify.test.fraction >= 1:
            raise ValueError("`data.eval.fraction` and `classify.test.fraction` leave nothing to train on")
        held = self.data.eval
        for name in ("precision", "threshold"):
            if getattr(self.classify, name) and not (held.fraction or held.sources):
                raise ValueError(f"`classify.{name}` needs eval rows to choose the threshold on: set `data.eval`")
        return self


def loss(trunk: nn.Module, batch: Forest, weights: Tensor, smoothing: float) -> tuple[Tensor, Metrics]:
    """Sum over the batch's texts of the weighted negative log-likelihood of the class; `weights`: (C,) float32."""
    logprobs = trunk(batch).log_softmax(-1)  # (P, C)
    number = batch.targets.long()
    nll = -logprobs.gather(1, number[:, None])[:, 0]
    smoothed = (1 - smoothing) * nll - smoothing * logprobs.mean(-1)
    total = (weights.to(logprobs.device)[number] * smoothed).sum()
    predicted, n = logprobs.argmax(-1), len(number)
    metrics: Metrics = {"loss": (total, n), "accuracy": ((predicted == number).sum(), n)}
    if not torch.is_grad_enabled():  # an evaluation
        taken, there = (torch.bincount(classes, minlength=len(weights)) for classes in (predicted, number))
        hits = torch.bincount(number[predicted == number], minlength=len(weights))
        metrics["class_f1"] = (2 * hits, taken + there)  # F1 is a ratio of sums
    return total, metrics


def derive(sums: Sums) -> dict[str, float]:
    """Mean F1 of all classes that were there or predicted, and the 95 % interval of the accuracy."""
    each = [f1 for f1 in sums.means()["class_f1"] if f1 is not None]
    low, high = interval(*sums.sums()["accuracy"])
    return {"macro_f1": sum(each) / len(each), "accuracy_low": low, "accuracy_high": high}


def class_weights(numbers: np.ndarray) -> Tensor:
    """(C,) float32: rows / (classes · rows of the class), with mean 1 over the rows."""
    return torch.tensor(numbers.sum() / (len(numbers) * numbers), dtype=torch.float32)


def choose(trunk: Trunk, section: Classify) -> None:
    """Freeze all of the trunk's own weights that are not to train."""
    if section.train in ("lora", "all"):
        return
    trunk.requires_grad_(False)
    below_head = f"{trunk.plain.base_model_prefix}."
    chosen = [p for name, p in trunk.plain.named_parameters() if not name.startswith(below_head)]
    if section.train == "last_blocks":
        blocks = trunk.layers
        chosen += blocks[-(section.blocks or 1) :].parameters()
        inside = {id(p) for p in blocks.parameters()}
        around = [(name, p) for name, p in trunk.decoder.named_parameters() if id(p) not in inside]
        chosen += [p for name, p in around if not re.match(r"(.*emb|wte|wpe)", name)]  # the final norm
    for parameter in chosen:
        parameter.requires_grad_()


def described(loop: Loop, last: bool, labels: list[str], test: Examples) -> dict[str, Any]:
    """Choose the threshold on the eval rows; what `--predict` has to know. After the last step, measure both held-out
    sides: the test rows are looked at once."""
    recipe, section = loop.recipe, loop.recipe.classify
    sides = {name: side for name, side in (("eval", loop.data.eval), ("test", test)) if len(side)}
    sides = sides if last else {name: sides[name] for name in sides if name == "eval"}
    known = {name: (probabilities(loop, side, name), class_numbers(side)) for name, side in sides.items()}
    threshold = None
    if wanted := section.precision or section.threshold:
        likely, numbers = known["eval"]
        chosen_by = partial(threshold_for, section.precision) if section.precision else threshold_of_best_f1
        threshold = chosen_by(likely[:, 1], numbers == 1)
        if threshold is None:
            aim = f"a precision of {wanted:g}" if section.precision else "an F1"
            loop.session.say(f"no threshold on the eval rows gives {labels[1]} {aim}")
    if "test" in known:
        record = {"step": loop.step, "split": "test", "examples": len(test)} | measured(*known["test"], labels)
        record["accuracy_low"], record["accuracy_high"] = interval(record["accuracy"] * len(test), len(test))
        if threshold:
            record |= at_threshold(threshold.threshold, *known["test"])
        tell(loop, {name: None if value != value else value for name, value in record.items()})
    if loop.session.first and last:
        results = {
            "labels": labels,
            "threshold": threshold and threshold._asdict(),
            "splits": {name: outcome(*about, labels) for name, about in known.items()},
            "mistakes": [m for name, side in sides.items() for m in mistaken(loop, name, side, *known[name], labels)],
        }
        write_atomic(loop.run.folder / RESULTS, to_json(results))
    config = loop.trunk.plain.config
    if config.pad_token_id is None:  # without it, transformers classifies one text at a time
        config.pad_token_id = loop.trunk.tokenizer.pad_token_id
    return {
        "labels": labels,
        "threshold": threshold and threshold.threshold,
        "max_length": recipe.data.max_length,
        "model": recipe.model.model_dump(),
        "lora": recipe.lora and recipe.lora.model_dump(),
    }


def probabilities(loop: Loop, side: Examples, name: str) -> np.ndarray:
    """(n, C) float64, on every process."""
    return softmax(
        torch.cat(loop.each(side, np.arange(len(side)), lambda trunk, forest: trunk(forest), f"scoring {name}")).numpy()
    )


def mistaken(
    loop: Loop, name: str, side: Examples, likely: np.ndarray, numbers: np.ndarray, labels: list[str]
) -> list[dict[str, Any]]:
    """The most confident mistakes of one side, as a report shows them."""
    told = []
    for i in map(int, mistakes(likely, numbers, MISTAKES)):
        text = loop.trunk.tokenizer.decode(side.tree(i).segments[0], skip_special_tokens=True)
        best = int(likely[i].argmax())
        told.append(
            {"split": name, "where": side.where(i), "text": text[:500], "label": labels[numbers[i]]}
            | {"predicted": labels[best], "probability": float(likely[i, best])}
        )
    return told


def tell(loop: Loop, record: dict[str, Any]) -> None:
    """A last line of metrics.jsonl."""
    if loop.session.first:
        loop.run.append("metrics.jsonl", record)
    shown = {name: "–" if value is None else value for name, value in record.items() if name not in ("step", "split")}
    numbers = " ".join(f"{name} {value}" if value == "–" else f"{name} {value:.4g}" for name, value in shown.items())
    loop.session.say(f"test  {numbers}")


def train(session: Session) -> None:
    """The stage, from recipe to `final/`."""
    recipe, section = session.recipe, session.recipe.classify
    run, tokenizer = session.open_run(), session.tokenizer()
    labels = section.labels or session.decided(lambda: find_labels(recipe.data.train))
    for name in ("precision", "threshold"):
        if getattr(section, name) and len(labels) > 2:
            raise UserError(f"classify.{name}: needs two classes, found {len(labels)}: {', '.join(labels[:10])}")
    undersample, cache = section.balance == "undersample", cache_folder()

    def read() -> Sides:
        with counting(session.console) as progress:
            return prepare_classes(
                recipe.data, section.test, undersample, labels, tokenizer, recipe.seed, cache, progress, foreign
            )

    data, test = first_then_others(session.accelerator, read)
    for line in data.summary:
        session.say(line)
    session.check_limits(tokenizer, [Wanted(side) for side in (data.train, data.eval, test)])
    if session.show:
        return show(session, data.train, tokenizer, labels)
    if not session.unfinished(run, tokenizer, {"train": data.train, "eval": data.eval, "test": test}):
        return None
    outputs = len(labels)
    trunk = load_trunk(session, outputs)
    choose(trunk, section)
    numbers = counts(data.train, outputs)
    weights = class_weights(numbers) if section.balance == "weights" else torch.ones(outputs)
    objective = partial(loss, weights=weights, smoothing=section.label_smoothing)
    about = partial(described, labels=labels, test=test)
    return fit(session, run, trunk, data, objective, derive=derive, described=about, labels=labels)


def show(session: Session, examples: Examples, tokenizer: Any, labels: list[str]) -> None:
    """What `--show` prints: the first texts of the first epoch under their labels."""
    for i in map(int, examples.order(session.recipe.seed, 0)[:SHOWN]):
        tree = examples.tree(i)
        label = labels[int(tree.targets[0])]
        session.say(f"\n{examples.where(i)} ({tree.packed_length} tokens): {label}")
        session.say(tokenizer.decode(tree.segments[0], clean_up_tokenization_spaces=False))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--predict" in words:
        return predict_command(words)
    return run_stage(Recipe, "align.classify", train, argv)


if __name__ == "__main__":
    main()
