"""Texts with labels: each becomes a stem of tokens that carries the number of its class.

A label is a text, a number or a truth value; `labels.py` says which ways of writing one are the same. A class's number
is its label's place in the list of labels: the recipe's, or all labels found in the data, sorted.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.examples import Examples, Ledger, Part, joined
from align.data.fitting import counted
from align.data.formats.formats import read_rows
from align.data.formats.labels import alike, formats, key_of, order
from align.data.formats.reading import Reading
from align.data.formats.rows import Fault, Row
from align.data.formats.shown import shown
from align.data.mixture import Prepared, at_most, prepare, proportions, split_by_prompt
from align.data.store import Progress
from align.data.templates.chat import Unwritable
from align.data.templates.control import controls_of
from align.data.trees import Tree
from align.recipe.errors import UserError
from align.recipe.functions import Border
from align.recipe.schema import Data, Eval, Source

UNDERSAMPLED = "undersampled"
MOST_LABELS = 1000  # more are no classes but a column of something else


class Sides(NamedTuple):
    """What a classifier trains on, is watched on, and is tested on."""

    data: Prepared  # train and eval
    test: Examples


def classes(labels: Sequence[str]) -> Reading:
    """Texts with one of `labels`; the tree's target is the label's place among them."""
    return Reading(f"classes, {json.dumps(labels)}", formats(labels), partial(_render, labels=labels))


def find_labels(sources: Sequence[Source]) -> list[str]:
    """All labels of the sources: numbers in their order, then texts in theirs. Rows at fault are passed over.

    Raises UserError for a single label, and for a column that does not look like labels.
    """
    found: dict[Hashable, str] = {}  # by what tells labels apart, how each is written
    rows = 0
    for source in sources:
        for row in read_rows(source, formats(None)):
            if isinstance(row, Row):
                key = key_of(row.label)
                found[key] = row.label if found.get(key, row.label) == row.label else str(key)
                rows += 1
    named = ", ".join(source.path for source in sources)
    if len(found) > MOST_LABELS or len(found) > max(2, rows // 2):
        raise UserError(
            f"{named}: {len(found):,} different labels in {rows:,} rows; which column holds the labels? "
            "Map it (`columns: {label: …, text: …}`), or name the labels in classify.labels"
        )
    if len(found) == 1:
        only = found.popitem()[1]
        raise UserError(f"{named}: every row has the label {only!r}; a classifier needs two or more")
    return sorted(found.values(), key=order)


def prepare_classes(
    data: Data,
    test: Eval,
    undersample: bool,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache: Path,
    progress: Progress | None = None,
    border: Border | None = None,
) -> Sides:
    """Read all sources, leave out what is too many of the frequent classes, and split by text into three sides.

    `data.eval` and `test` are shares of all rows that are left, or sources of their own; no text stands on two sides.
    Raises UserError as `prepare` does, and for a class of which no row is left to train on.
    """
    reading = classes(labels)
    whole = data.model_copy(update={"eval": data.eval if data.eval.sources else Eval()})
    read = prepare(whole, tokenizer, reading, seed, cache, progress, border)
    train, held, tested, ledger = read.train.parts, read.eval.parts, [], read.ledger
    summary = [line for line in read.summary if not line.startswith(("train: ", "eval: "))]
    if test.sources:
        alone = data.model_copy(update={"train": test.sources, "eval": Eval(), "prepare": None})
        apart = prepare(alone, tokenizer, reading, seed, cache, progress)
        ledger.entries += apart.ledger.entries
        summary += [f"test: {line}" for line in apart.summary if not line.startswith(("train: ", "eval: "))]
        tested = at_most(apart.train.parts, test.max_rows, seed, ledger, "classify.test.max_rows")
        train, held = (_without(parts, tested, ledger) for parts in (train, held))
        if known := ledger.dropped["in test"]:
            summary.append(f"{counted(known)} left out: the text is in the test set")
    _all_there(Examples(train, data.max_length), labels)
    if undersample:
        train = _undersampled(train, len(labels), seed, ledger)
    if data.eval.fraction:
        train, held = split_by_prompt(train, data.eval.fraction, data.eval.max_rows, seed)
    if test.fraction:
        train, tested = split_by_prompt(train, test.fraction / (1 - data.eval.fraction), test.max_rows, seed)
    named = {"train": train, "eval": held, "test": tested}
    sides = {name: Examples(parts, data.max_length, data.weigh_by) for name, parts in named.items()}
    _all_there(sides["train"], labels)
    summary += alike(labels)
    if undersample:
        summary.append(f"undersampled: {ledger.dropped[UNDERSAMPLED]:,} rows of the frequent classes are left out")
    summary += [f"{name}: {_counted(side, labels)}" for name, side in sides.items() if len(side)]
    summary += proportions(sides["train"]) if data.weigh_by == "tokens" else []
    return Sides(Prepared(sides["train"], sides["eval"], ledger, list(map(shown, summary))), sides["test"])


def class_numbers(examples: Examples) -> np.ndarray:
    """(n,) int64, the class of each example."""
    return joined([_numbers(part) for part in examples.parts])


def counts(examples: Examples, classes: int) -> np.ndarray:
    """(classes,) int64, examples of each class."""
    return np.bincount(class_numbers(examples), minlength=classes)


def _render(rows: list[Row], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[Tree | Fault]:
    """Each text as the tokenizer writes it, with the special tokens that it adds by itself."""
    controls = controls_of(tokenizer)
    texts: list[str | Fault] = []
    for row in rows:
        try:
            texts.append(controls.words(row, row.text))
        except Unwritable as error:
            texts.append(Fault(row.file, row.line, str(error)))
    encoded = iter(controls.encode([text for text in texts if isinstance(text, str)], add_special_tokens=True))
    return [
        text if isinstance(text, Fault) else _tree(row, next(encoded).ids, labels, controls.notes(text))
        for row, text in zip(rows, texts, strict=True)
    ]


def _tree(row: Row, ids: np.ndarray, labels: Sequence[str], notes: tuple[str, ...]) -> Tree | Fault:
    if not len(ids):
        return Fault(row.file, row.line, "text: the tokenizer makes no token of it")
    return Tree((ids,), (np.zeros(len(ids), bool),), (float(labels.index(row.label)),), notes=notes)


def _numbers(part: Part) -> np.ndarray:
    store = part.store
    return store.targets[store.examples[part.rows]].astype(np.int64)


def _all_there(train: Examples, labels: Sequence[str]) -> None:
    absent = [label for label, n in zip(labels, counts(train, len(labels)), strict=True) if not n]
    if absent:
        raise UserError(
            f"classify.labels: no row to train on has the label {', '.join(map(repr, absent))}, of "
            f"{_counted(train, labels)}; give rows of each, or leave the label out"
        )


def _undersampled(parts: list[Part], classes: int, seed: int, ledger: Ledger) -> list[Part]:
    """A seeded choice of as many rows of every class as the rarest has."""
    numbers = joined([_numbers(part) for part in parts])
    least = min(n for n in np.bincount(numbers, minlength=classes))
    drop = np.ones(len(numbers), bool)
    for number in range(classes):
        rows = np.flatnonzero(numbers == number)
        drop[np.random.default_rng([seed, 4, number]).permutation(rows)[:least]] = False
    masks = np.split(drop, np.cumsum([len(part.rows) for part in parts])[:-1])
    reason = f"beyond {least} rows of its class (classify.balance)"
    return [ledger.drop(part, mask, UNDERSAMPLED, reason) for part, mask in zip(parts, masks, strict=True)]


def _without(parts: list[Part], tested: list[Part], ledger: Ledger) -> list[Part]:
    """The parts without texts that are tested on."""
    texts = joined([part.store.prompt[part.rows] for part in tested])
    return [
        ledger.drop(part, np.isin(part.store.prompt[part.rows], texts), "in test", "its text is in the test set")
        for part in parts
    ]


def _counted(examples: Examples, labels: Sequence[str]) -> str:
    """`12 rows, 300 tokens: 4 spam, 8 ham`, the largest classes first."""
    sizes = counts(examples, len(labels))
    most = np.argsort(-sizes, kind="stable")[:10]
    named = ", ".join(f"{sizes[i]:,} {labels[i]}" for i in most) + ", …" * (len(labels) > 10)
    return f"{len(examples):,} row{'s' * (len(examples) != 1)}, {int(examples.lengths.sum()):,} tokens: {named}"
