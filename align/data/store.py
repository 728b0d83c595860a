"""Token stores: the trees of one source on disk, memory-mapped, so that sets larger than memory work.

A store is a folder `tokens/<key>/` in the cache. The key covers everything that the tokens depend on and
nothing else, so that another seed, split or length limit finds the same store. It is written beside its place
and renamed, and its manifest's hashes are checked whenever it is opened: a damaged one is built anew.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b, file_digest, sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.files.paths import data_files, is_hub_id
from align.data.formats.formats import find, read_rows
from align.data.formats.reading import Reading
from align.data.formats.rows import Fault, Formats, Row
from align.data.templates.chats import chat_of
from align.data.templates.render import prompt_key
from align.data.trees import Tree
from align.recipe.errors import UserError
from align.recipe.locks import alone
from align.recipe.schema import Source

VERSION = 5  # of the store's files and of what the code above makes of a row: raise it when either changes
BATCH = 512  # rows that are rendered and tokenised at once
COLUMNS = {
    "segments": "q",
    "examples": "q",
    "labels": "q",
    "longest": "q",
    "targets": "f",
    "file_id": "q",
    "line": "q",
    "plain": "b",
    "prompt": "Q",
    "content": "Q",
}
FILES = ("tokens.bin", "trained.bin", "index.npz", "about.json")

Progress = Callable[[str, int], None]  # (what is going on, rows so far)


class Left(Protocol):
    """Rows that are left of a source by steps of preparation."""

    key: list[Any]  # all that they depend on besides the source

    def rows(self) -> Iterator[Row]:
        """In the order of the source."""
        ...

    def records(self) -> Iterator[tuple[dict[str, Any], Row]]:
        """The same with their records."""
        ...


class Store(NamedTuple):
    """The trees of one source and where they come from: T tokens, S segments, n examples."""

    tokens: np.ndarray  # (T,) int32, memory-mapped
    trained: np.ndarray  # (T,) bool, memory-mapped
    segments: np.ndarray  # (S + 1,) int64, where each segment starts among the tokens
    examples: np.ndarray  # (n + 1,) int64, where each example starts among the segments; its first is the stem
    labels: np.ndarray  # (n,) int64, trained tokens
    longest: np.ndarray  # (n,) int64, tokens of the longest path
    targets: np.ndarray  # (S,) float32, of the path that ends with each segment; nan where nothing is known of it
    file_id: np.ndarray  # (n,) int64, index into `files`
    line: np.ndarray  # (n,) int64
    plain: np.ndarray  # (n,) int8, 1 where the row is a text, which has no turns
    prompt: np.ndarray  # (n,) uint64, hash of the prompt
    content: np.ndarray  # (n,) uint64, hash of the tokens and what is trained of them
    files: list[str]
    found: list[str]  # the format of each file and how it was told
    faults: list[Fault]
    repairs: list[Fault]  # what was changed in which row
    remarks: list[str]  # what else is to be said of a file

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of each example, all its segments together."""
        return np.diff(self.segments[self.examples])

    @property
    def rows(self) -> int:
        """Rows that were read, those at fault included."""
        return len(self.line) + len(self.faults)

    def tree(self, i: int) -> Tree:
        """Example `i`."""
        first, last = self.examples[i], self.examples[i + 1]
        cuts = list(pairwise(self.segments[first : last + 1]))
        known = self.targets[first:last][1:] if last - first > 1 else self.targets[first:last]
        return Tree(
            tuple(np.array(self.tokens[a:b]) for a, b in cuts),
            tuple(np.array(self.trained[a:b]) for a, b in cuts),
            () if np.isnan(known).all() else tuple(known.tolist()),
        )

    def slice(self, i: int, first: int, last: int) -> Tree:
        """Tokens `first` to `last` of example `i`, which has no branches, as a tree of their own.

        Nothing in it predicts its first token, which is context.
        """
        start = self.segments[self.examples[i]]
        tokens, trained = (np.array(stored[start + first : start + last]) for stored in (self.tokens, self.trained))
        trained[:1] = False
        return Tree((tokens,), (trained,))

    def place(self, i: int) -> tuple[str, int]:
        """File and line of example `i`."""
        return self.files[self.file_id[i]], int(self.line[i])


def stored(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    cache: Path,
    progress: Progress | None = None,
    left: Left | None = None,
) -> Store:
    """The store of the source, or of the rows that are left of it, from the cache, built if it is not there or damaged.
    Raises UserError as `read_rows` does.
    """
    folder = cache / "tokens" / _key(source, tokenizer, reading, left)
    if _whole(folder):
        return _open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{folder.name}.lock")):
        if not _whole(folder):  # else another run was building it while this one waited
            beside = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
            beside.mkdir()
            try:
                _build(beside, source, tokenizer, reading, progress, left)
                shutil.rmtree(folder, ignore_errors=True)
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return _open(folder)


def _build(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    progress: Progress | None,
    left: Left | None,
) -> None:
    columns = {name: array(kind) for name, kind in COLUMNS.items()}
    columns["segments"].append(0)
    columns["examples"].append(0)
    files: dict[str, int] = {}
    faults, repairs, rows = [], [], 0
    remarks: Counter[tuple[str, str]] = Counter()  # (file, remark) -> rows
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "trained.bin").open("wb") as marks:
        for batch in _batches(left.rows() if left else read_rows(source, reading.formats)):
            trees = iter(reading.render([row for row in batch if isinstance(row, Row)], tokenizer))
            for row in batch:
                tree = row if isinstance(row, Fault) else next(trees)
                if isinstance(tree, Fault):
                    faults.append(tree)
                    continue
                repairs += [Fault(row.file, row.line, repair) for repair in (*row.repairs, *tree.notes)]
                remarks.update((row.file, remark) for remark in row.remarks)
                content = blake2b(digest_size=8)
                for ids, trained in zip(tree.segments, tree.trained, strict=True):
                    tokens.write(ids.astype(np.int32).tobytes())
                    marks.write(trained.tobytes())
                    columns["segments"].append(columns["segments"][-1] + len(ids))
                    content.update(len(ids).to_bytes(8, "little") + ids.tobytes() + trained.tobytes())
                content.update(json.dumps(tree.targets).encode())
                columns["examples"].append(columns["examples"][-1] + len(tree.segments))
                branches = [len(ids) for ids in tree.segments[1:]]
                unknown = [float("nan")] * len(tree.segments)
                columns["targets"].extend((unknown[: bool(branches)] + list(tree.targets)) if tree.targets else unknown)
                columns["longest"].append(len(tree.segments[0]) + max(branches, default=0))
                columns["labels"].append(tree.label_count)
                columns["file_id"].append(files.setdefault(row.file, len(files)))
                columns["line"].append(row.line)
                columns["plain"].append(row.messages is None)
                columns["prompt"].append(int.from_bytes(prompt_key(row), "little"))
                columns["content"].append(int.from_bytes(content.digest(), "little"))
            rows += len(batch)
            if progress:
                progress(f"tokenising {source.path}", rows)
    np.savez(folder / "index.npz", **{name: np.array(column) for name, column in columns.items()})
    about = {
        "files": list(files),
        "found": list(map(str, find(source, reading.formats))),
        "faults": faults,
        "repairs": repairs,
        "remarks": [f"{file}: {remark} ({n:,} row{'s' * (n > 1)})" for (file, remark), n in remarks.items()],
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    manifest = {name: _digest(folder / name) for name in FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _open(folder: Path) -> Store:
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        columns = {name: index[name] for name in COLUMNS}
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return Store(
        tokens=_mapped(folder / "tokens.bin", np.int32),
        trained=_mapped(folder / "trained.bin", np.bool_),
        **columns,
        files=about["files"],
        found=about["found"],
        faults=[Fault(*fault) for fault in about["faults"]],
        repairs=[Fault(*repair) for repair in about["repairs"]],
        remarks=about["remarks"],
    )


def _whole(folder: Path) -> bool:
    """Whether the store is there and every file's hash is the manifest's."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest == {name: _digest(folder / name) for name in FILES}
    except (OSError, ValueError):
        return False


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, reading: Reading, left: Left | None) -> str:
    about = {
        "version": VERSION,
        "content": content_of(source, reading.formats),
        "source": source.model_dump(include={"format", "columns", "turn_keys", "roles", "control_tokens", "limit"}),
        **writer_of(tokenizer),
        "reading": reading.name,
        **({"left": left.key} if left else {}),
    }
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def writer_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides which tokens a conversation or a text becomes, as JSON can hold it."""
    backend, chat = json.loads(tokenizer.backend_tokenizer.to_str()), chat_of(tokenizer)
    return {
        # Truncation and padding are settings of a call, not of the tokenizer.
        "tokenizer": {name: part for name, part in backend.items() if name not in ("truncation", "padding")},
        "chat": [chat.template, chat.special],
        "eos": tokenizer.eos_token_id,
    }


def content_of(source: Source, formats: Formats) -> list[list[str]]:
    """Names and hashes of the source's files; of a hub data set, which has none here, a hash of its rows."""
    if not is_hub_id(source.path):
        return [[str(path), _hashed(path)] for path in data_files(source.path)]
    rows = sha256()
    for row in read_rows(source, formats):
        rows.update(json.dumps(row).encode())
    return [[source.path, source.name, source.split, rows.hexdigest()]]


def _hashed(path: Path) -> str:
    """The digest of a user's file. Raises UserError where it cannot be read."""
    try:
        return _digest(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _batches(rows: Iterator[Row | Fault]) -> Iterator[list[Row | Fault]]:
    while batch := list(islice(rows, BATCH)):
        yield batch
