"""Sources become one mixture: filtered, split into train and eval by prompt, and put in a seeded order.

Tokens come from the stores; everything here works on their index alone, so it is quick, and the same on every
process. Nothing goes missing in silence: each row that was dropped, truncated or repaired is an entry of the
ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.data.examples import Examples, Ledger, Part, joined
from align.data.files.paths import is_hub_id, survey
from align.data.fitting import NAMED, chunked, counted, fitted
from align.data.formats.reading import Reading
from align.data.formats.shown import shown
from align.data.preparing.stage import cleaned
from align.data.prompt_set import PromptSet
from align.data.store import Left, Progress, stored
from align.recipe.errors import UserError, printable
from align.recipe.functions import Border
from align.recipe.schema import Data, Source

MOST = 2**31  # rows of an epoch, whose order is made at once


class Prepared(NamedTuple):
    """What a run trains and evaluates on, and what became of every row."""

    train: Examples
    eval: Examples
    ledger: Ledger
    summary: list[str]  # lines for the screen
    prompts: PromptSet | None = None  # that are answered while the run trains

    def named(self, name: str) -> list[str]:
        """The summary of rows that a run reads beside its own, all of which it learns from."""
        lines = [line.removeprefix("train: ") for line in self.summary if not line.startswith("eval: ")]
        return [f"{name}: {line}" for line in lines]

    def beside(self, others: Mapping[str, Prepared]) -> Prepared:
        """The same with what became of the rows of others, by their names."""
        ledger = Ledger()
        ledger.entries = [entry for each in (self, *others.values()) for entry in each.ledger.entries]
        named = [line for name, other in others.items() for line in other.named(name)]
        return self._replace(ledger=ledger, summary=[*self.summary, *named])


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    seed: int,
    cache: Path,
    progress: Progress | None = None,
    border: Border | None = None,
) -> Prepared:
    """Read, tokenise (or find in `cache`), filter and split. Let one process call it first; the others then
    find all. `border`: around functions of the user's own that rows pass; without one, there may be none.

    Raises UserError, with every problem at once, for sources that cannot be read, rows that cannot be taken
    or are too long where the recipe asks for an error, and a side that is left without rows.
    """
    if data.overlong == "chunk" and not reading.chunks:
        raise UserError(
            "data.overlong: chunk cuts texts that a model learns to write, which is what align.sft does; this stage "
            "takes whole rows: set drop, truncate or error"
        )
    ledger, left = Ledger(), list[Left | None]([None] * len(data.train))
    if data.prepare:
        prepared = cleaned(data, reading.formats, seed, cache, border, progress or _untold)
        prepared.enter(ledger)
        left = [prepared.source(place) for place in range(len(data.train))]
    train, notes = _parts(data.train, left, tokenizer, reading, cache, progress)
    held, more = _parts(data.eval.sources, [None] * len(data.eval.sources), tokenizer, reading, cache, progress)
    gone = ledger.dropped.total()
    problems = _invalid(data, train + held, ledger)
    (train, held), long = fitted(data, [train, held], ledger)
    if problems or long:
        raise UserError(*problems, *long)
    copies = [_copies(train), _copies(held)]
    if data.duplicates == "drop":
        train, held = (
            [
                ledger.drop(part, mask, "duplicate", "an exact duplicate of an earlier row")
                for part, mask in zip(*both, strict=True)
            ]
            for both in ((train, copies[0]), (held, copies[1]))
        )
    if data.overlong == "chunk":
        train, held = ([chunked(part, data.max_length, ledger) for part in parts] for parts in (train, held))
    read = gone + sum(part.store.rows for part in (*train, *held))
    _some(train, "train", read, ledger)
    if data.eval.fraction:
        train, held = split_by_prompt(train, data.eval.fraction, data.eval.max_rows, seed)
    held = at_most(held, data.eval.max_rows, seed, ledger, "data.eval.max_rows")
    if data.eval.sources:
        _some(held, "eval", read, ledger)
        prompts = joined([part.store.prompt[part.rows] for part in held])
        train = [
            part
            if data.eval.overlap == "keep"
            else ledger.drop(
                part,
                np.isin(part.store.prompt[part.rows], prompts),
                "in eval",
                "its prompt is in the eval set",
            )
            for part in train
        ]
        _some(train, "train", read, ledger)
    sides = Examples(train, data.max_length, data.weigh_by), Examples(held, data.max_length)
    if (asked := float((sides[0].passes * np.diff(sides[0].starts)).sum())) > MOST:
        raise UserError(f"data.train: by these weights an epoch has {asked:.3g} rows; a weight of 2 is two passes")
    duplicates = sum(int(mask.sum()) for masks in copies for mask in masks)
    notes = [*dict.fromkeys(notes + more), *_summary(*sides, ledger, read, duplicates)]
    notes += proportions(sides[0]) if data.weigh_by == "tokens" else []
    notes += reading.survey(*sides) if reading.survey else []
    return Prepared(*sides, ledger, list(map(shown, notes)))


@contextmanager
def counting(console: Console) -> Iterator[Progress]:
    """A `progress` that shows, after 2 s, how many rows are done of what; off a terminal, a line each 10 s."""
    started = told = time.monotonic()
    status = console.status("")

    def tell(doing: str, rows: int) -> None:
        nonlocal told
        now = time.monotonic()
        line = f"{doing}: {rows:,} rows"
        if console.is_terminal and now - started > 2:
            status.update(Text(printable(line)))  # the name of a file is no markup
            status.start()
        elif not console.is_terminal and now - told > 10:
            told = now
            console.print(printable(line), markup=False, highlight=False)

    try:
        yield tell
    finally:
        status.stop()


def _parts(
    sources: list[Source],
    left: Sequence[Left | None],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    cache: Path,
    progress: Progress | None,
) -> tuple[list[Part], list[str]]:
    """The rows of all sources, or what is `left` of them, and what is to be said of links among their files."""
    parts, notes, problems = [], [], []
    for source, rest in zip(sources, left, strict=True):
        try:
            store = stored(source, tokenizer, reading, cache, progress, rest)
            notes += [] if is_hub_id(source.path) else survey(source.path).remarks
            parts.append(Part(source, store, np.arange(len(store.line)), left=rest))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return parts, notes


def _untold(doing: str, rows: int) -> None:
    """For nobody."""


def _invalid(data: Data, parts: list[Part], ledger: Ledger) -> list[str]:
    """Enters faults and repairs in the ledger; the problems to raise, if faults are errors."""
    faults = [fault for part in parts for fault in part.store.faults]
    for part in parts:
        for repair in part.store.repairs:
            ledger.add(*repair[:2], "repaired", repair.reason)
    for fault in faults:
        ledger.lose(*fault[:2], "invalid", fault.reason)
    if not faults or data.invalid == "drop":
        return []
    lines = [f"{fault.file}:{fault.line}: {fault.reason}" for fault in faults[:NAMED]]
    rest = f"… and {len(faults) - NAMED:,} more; " if len(faults) > NAMED else ""
    return [
        *lines,
        f"{rest}{counted(len(faults))} cannot be taken: mend them, or leave them out with data.invalid=drop",
    ]


def _copies(parts: list[Part]) -> list[np.ndarray]:
    """For each part (k,) bool, True where an earlier row, of any part, is exactly the same."""
    content = joined([part.store.content[part.rows] for part in parts])
    copy = np.ones(len(content), bool)
    copy[np.unique(content, return_index=True)[1]] = False
    return np.split(copy, np.cumsum([len(part.rows) for part in parts])[:-1]) if parts else []


def split_by_prompt(parts: list[Part], fraction: float, most: int | None, seed: int) -> tuple[list[Part], list[Part]]:
    """Train and eval with no prompt in both: whole prompts, by a seeded hash of each, until the share is
    reached.

    A prompt's place in that order depends on the seed and itself alone, so more data moves few rows across.
    """
    prompts, counts = np.unique(joined([part.store.prompt[part.rows] for part in parts]), return_counts=True)
    if len(prompts) < 2:
        raise UserError("data.eval.fraction: all rows share one prompt, so none can be held out; set it to 0")
    total = int(counts.sum())
    wanted = min(round(fraction * total), total - 1, most or total)
    order = sorted(range(len(prompts)), key=lambda i: _hash(seed, int(prompts[i])))
    taken, held = [], 0
    for i in order:
        if held + counts[i] <= wanted:
            taken.append(i)
            held += counts[i]
    taken = taken or [min(order, key=lambda i: counts[i])]  # one row is still too many: the rarest prompt
    masks = [np.isin(part.store.prompt[part.rows], prompts[taken]) for part in parts]
    return (
        [part.less(mask) for part, mask in zip(parts, masks, strict=True)],
        [part.less(~mask) for part, mask in zip(parts, masks, strict=True)],
    )


def proportions(train: Examples) -> list[str]:
    """Of each source, in lines, the share of an epoch's tokens that its weight asks for, and the one that it has."""
    sizes = np.diff(train.starts)
    wanted = np.where(sizes > 0, [part.source.weight for part in train.parts], 0.0)
    rows = np.where(sizes > 0, np.maximum(1, np.round(train.passes * sizes)), 0)
    seen = rows * np.array(train.tokens) / np.maximum(sizes, 1)
    return [
        f"train: {part.source.path}: {100 * want / wanted.sum():.1f} % of the tokens wanted, "
        f"{100 * has / seen.sum():.1f} % in an epoch ({passes:.3g} passes over its {counted(n)})"
        for part, want, has, passes, n in zip(train.parts, wanted, seen, train.passes, sizes.tolist(), strict=True)
    ]


def at_most(parts: list[Part], most: int | None, seed: int, ledger: Ledger, key: str) -> list[Part]:
    """A seeded choice of `most` rows, as the recipe's `key` says."""
    sizes = [len(part.rows) for part in parts]
    if most is None or sum(sizes) <= most:
        return parts
    drop = np.ones(sum(sizes), bool)
    drop[np.random.default_rng([seed, 3]).permutation(len(drop))[:most]] = False
    reason = f"held out, beyond {key} = {most}"
    masks = np.split(drop, np.cumsum(sizes)[:-1])
    return [ledger.drop(part, mask, "beyond max_rows", reason) for part, mask in zip(parts, masks, strict=True)]


def _some(parts: list[Part], side: str, read: int, ledger: Ledger) -> None:
    if not any(len(part.rows) for part in parts):
        why = ", ".join(f"{count:,} {kind}" for kind, count in ledger.dropped.items() if count)
        first = [place for places in ledger.first.values() for place in places]
        raise UserError(f"data.{side}: no row is left of {read:,} read; dropped: {why or 'none'}", *first)


def _summary(train: Examples, held: Examples, ledger: Ledger, read: int, duplicates: int) -> list[str]:
    seen = {id(part.store): part.store for part in (*train.parts, *held.parts)}.values()
    dropped = ", ".join(f"{count:,} {kind}" for kind, count in ledger.dropped.items() if count)
    truncated, chunks, repaired = map(ledger.count, ("truncated", "chunked", "repaired"))
    lines = [line for store in seen for line in (*store.found, *store.remarks)]
    cut = f"{truncated:,} truncated, " + f"{chunks:,} cut into chunks, " * bool(chunks)
    lines.append(
        f"{counted(read)} read, {ledger.dropped.total():,} dropped{f' ({dropped})' if dropped else ''}, "
        f"{cut}{repaired:,} repaired, {duplicates:,} exact duplicates"
    )
    for side, examples in (("train", train), ("eval", held)):
        tokens, labels = int(examples.lengths.sum()), int(examples.labels.sum())
        trained = f", {labels:,} of them trained" if labels else ""  # prompts have none
        lines.append(f"{side}: {_counted(examples)}, {tokens:,} tokens{trained}")
    return lines


def _counted(examples: Examples) -> str:
    """Pairs, where every row is one, or rows with the answers to compare in them, or the examples that rows are cut
    into."""
    count, paths = len(examples), examples.paths
    rows = sum(len(np.unique(part.rows)) for part in examples.parts)
    if rows < count:
        return f"{count:,} examples of {counted(rows)}"
    if count and (paths == 2).all():
        return f"{count:,} pair{'s' * (count != 1)}"
    return counted(count) + (f" with {paths.sum():,} answers" if (paths > 1).any() else "")


def _hash(seed: int, prompt: int) -> bytes:
    return blake2b(seed.to_bytes(8, "little") + prompt.to_bytes(8, "little"), digest_size=8).digest()
