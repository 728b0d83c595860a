"""Held-out prompts that are answered while a run trains, and what each answer is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.examples import Examples, Ledger
from align.data.fitting import counted
from align.data.formats.formats import read_records
from align.data.formats.prompts import Asked, prompts
from align.data.formats.references import ANSWERABLE, answerable
from align.data.formats.rows import Fault, Row
from align.data.store import BATCH, Progress
from align.recipe.errors import UserError
from align.recipe.schema import Data, Source

NAMED = 5  # rows that a message names one by one
CHOICE = 9  # tells this stream of random numbers apart


class PromptSet(NamedTuple):
    """Prompts, each once, in the order of their rows."""

    stems: list[np.ndarray]  # each (l,) int32 token ids, as the chat template opens the assistant's turn
    rows: list[Asked]  # what each was made of
    references: list[str | None]  # the answer that its row has
    where: list[str]  # `file:line`
    said: list[str]  # lines for the screen

    @property
    def keys(self) -> list[int]:
        """A hash of each prompt's tokens: its draws depend on it alone."""
        hashes = (blake2b(np.asarray(stem, np.int32).tobytes(), digest_size=8) for stem in self.stems)
        return [int.from_bytes(found.digest(), "little") for found in hashes]

    @property
    def identity(self) -> str:
        """A hash of what figures of the answers depend on: prompts, references, and rows as files have them."""
        whole = sha256()
        for key, row, reference in zip(self.keys, self.rows, self.references, strict=True):
            whole.update(json.dumps([key, row.record, reference], sort_keys=True, default=str).encode())
        return whole.hexdigest()[:16]


def prompt_set(
    sources: Sequence[Source],
    held: Examples,
    data: Data,
    most: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    ledger: Ledger,
    progress: Progress | None = None,
) -> PromptSet:
    """At most `most` prompts, a seeded choice, of these sources; without any, of the eval rows.

    Rows of the sources that cannot be taken, or are longer than `data.max_length`, are errors or drops, as the recipe
    says. Of the eval rows those that ask for no answer are left out; plain texts that are learnt are such. Raises
    UserError with every problem, and where no prompt is left.
    """
    own = bool(sources)
    read = []
    for path, record, row in _of_sources(sources) if own else _of_examples(held):
        read.append((record, row))
        if progress and len(read) % BATCH == 0:
            progress(f"reading {path}", len(read))
    faults = [row for _, row in read if isinstance(row, Fault)]
    chosen, total = _distinct([(record, row) for record, row in read if isinstance(row, Row)], most, seed)
    trees = prompts().render([row for _, row in chosen], tokenizer)
    faults += [tree for tree in trees if isinstance(tree, Fault)]
    kept = [(*pair, tree.segments[0]) for pair, tree in zip(chosen, trees, strict=True) if not isinstance(tree, Fault)]
    long = [Fault(row.file, row.line, f"{len(stem):,} tokens") for _, row, stem in kept if len(stem) > data.max_length]
    kept = [(record, row, stem) for record, row, stem in kept if len(stem) <= data.max_length]
    if own:
        _refuse(faults, long, data)
        for fault in faults:
            ledger.lose(*fault[:2], "invalid", fault.reason)
        for fault in long:
            ledger.lose(*fault[:2], "overlong", f"more than {data.max_length} tokens in a prompt")
    if not kept:
        why = f" (the first: {faults[0].file}:{faults[0].line}: {faults[0].reason})" if faults else ""
        raise UserError(
            f"train.generate: no row of {'its sources' if own else 'data.eval'} has a prompt to be answered{why}; give "
            "rows with prompts in train.generate.sources"
        )
    said = [f"{len(kept):,} of {total:,} held-out prompts are answered"]
    if lost := len(faults) + len(long):
        said.append(f"{counted(lost)} without a prompt to answer {'is' if lost == 1 else 'are'} left out")
    return PromptSet(
        [stem for *_, stem in kept],
        [Asked(record, row.messages, row.text) for record, row, _ in kept],
        [row.answers[0]["content"] if row.answers else None for _, row, _ in kept],
        [f"{row.file}:{row.line}" for _, row, _ in kept],
        said,
    )


def _of_sources(sources: Sequence[Source]) -> Iterator[tuple[str, dict[str, Any], Row | Fault]]:
    for source in sources:
        for record, row in read_records(source, ANSWERABLE):
            yield source.path, record, row


def _of_examples(held: Examples) -> Iterator[tuple[str, dict[str, Any], Row | Fault]]:
    """The rows of all examples, read again from their files; a text that is learnt, and no prompt, as a fault."""
    for part in held.parts:
        learnt = {part.store.place(row): bool(part.store.labels[row]) for row in part.rows}
        changed = {} if part.source.format in ANSWERABLE else {"format": "auto"}
        source = part.source.model_copy(update=changed)
        left = part.left.records() if part.left else ()
        read = ((record, answerable(record, row)) for record, row in left)
        for record, row in read if part.left else read_records(source, ANSWERABLE):
            if (row.file, row.line) not in learnt:
                continue
            whole = isinstance(row, Row) and row.messages is None and learnt[row.file, row.line]
            taken = Fault(row.file, row.line, "a text that is learnt whole") if whole else row
            yield part.source.path, record, taken


def _distinct(
    rows: Sequence[tuple[dict[str, Any], Row]], most: int, seed: int
) -> tuple[list[tuple[dict[str, Any], Row]], int]:
    """Each prompt once, in its first row that has an answer, if one has; a seeded choice of `most`; their number."""
    first: dict[str, tuple[dict[str, Any], Row]] = {}
    for record, row in rows:
        prompt = json.dumps([row.messages, row.text, row.tools])
        if prompt not in first or (row.answers and not first[prompt][1].answers):
            first[prompt] = record, row
    distinct = list(first.values())
    if len(distinct) <= most:
        return distinct, len(distinct)
    chosen = np.random.default_rng([seed, CHOICE]).permutation(len(distinct))[:most]
    return [distinct[i] for i in sorted(chosen)], len(distinct)


def _refuse(faults: list[Fault], long: list[Fault], data: Data) -> None:
    """UserError for rows that the recipe does not have dropped."""
    problems = []
    if faults and data.invalid == "error":
        problems += [f"{fault.file}:{fault.line}: {fault.reason}" for fault in faults[:NAMED]]
        problems.append(
            f"train.generate.sources: {counted(len(faults))} cannot be taken: mend them, or leave them out with "
            "data.invalid=drop"
        )
    if long and data.overlong == "error":
        first = ", ".join(f"{fault.file}:{fault.line} ({fault.reason})" for fault in long[:NAMED])
        problems.append(
            f"train.generate.sources: {counted(len(long))} longer than data.max_length = {data.max_length:,} tokens: "
            f"{first}; raise data.max_length, or set data.overlong=drop"
        )
    if problems:
        raise UserError(*problems)
