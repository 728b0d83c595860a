"""Labels for new texts: `python -m align.classify --predict runs/spam/final FILE`.

One line out for each row in, in their order, while the input is read; memory does not grow with it. A `.txt` file and
standard input hold a text a line; other files hold rows, the text in the column that `--text` names. A row without
text comes out without label, and stderr says why.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from align.data.files.files import read_file, text_lines
from align.data.files.lines import Broken
from align.data.files.paths import data_files
from align.data.formats.rows import Refused
from align.data.formats.shown import a, meant
from align.data.formats.values import encodable, filled
from align.data.graft import graft
from align.data.packing import pack_padded
from align.data.templates.chat import Unwritable
from align.data.templates.control import controls_of, encoded_text
from align.data.trees import Tree, plant
from align.models import acceleration
from align.models.base import load_base
from align.models.checkpoints.adapters import put, stranger, token_without_row, trunk_of
from align.models.checkpoints.results import META, About, check_finite, check_fit, read_about, read_result
from align.models.checkpoints.sources import check_weights, foreign, read_config, speaking_of
from align.models.limits import positions_of
from align.models.trunk import Trunk
from align.recipe.errors import UserError, printable
from align.recipe.paths import expanded, location
from align.recipe.records import to_json
from align.recipe.schema import Model
from align.training.borders.border import Parser, border
from align.training.heap import keep_freed_memory
from align.training.labelling.measures import softmax
from align.training.plan import row_budget

WINDOW = 4096  # texts that are read and sorted into rows at once


class Text(NamedTuple):
    """A row to classify: its line, and its text or why it has none."""

    line: int
    text: str | None
    fault: str = ""


class Classifier:
    """A finished `final/` folder, ready to classify."""

    def __init__(self, folder: Path, base: str | None = None, trust: bool = False) -> None:
        """`base`: what the user names in place of the base that the result names; `trust`: the user allows its code."""
        about, device = _about(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.labels, self.threshold = about.labels, about.threshold
        lora = None
        if about.role == "adapter":
            result = read_result(str(folder), "--predict", "a finished run of align.classify")
            lora, section = result.config.section, trunk_of(result, "--predict", "give --base", base, trust)
        else:  # the folder is the whole model: made from its config, then filled
            section = Model(base=str(folder), init="random", trust_remote_code=trust)
            check_weights(folder, read_config(folder, f"--predict: {folder}", trust), f"--predict: {folder}")
        section = section.model_copy(update=about.model.model_dump())
        with speaking_of("--predict"):
            loaded = load_base(section, device, frozen=lora is not None, outputs=len(self.labels))
            self.trunk = Trunk(loaded, section, lora, outputs=len(self.labels)).eval()
            if lora:
                if loaded.fingerprint != about.fingerprint:
                    raise UserError(f"--predict: {stranger(result, loaded, 'this trunk')}")
                put(self.trunk.causal, result.weights, "default", f"--predict: {folder}")
            else:
                _fill(self.trunk.plain, folder / "model.safetensors")
        self.max_length = min(filter(None, (about.max_length, positions_of(self.trunk.plain.config))))
        self.tokenizer, self.row_tokens = loaded.tokenizer, row_budget("auto", device)
        self.prepared = ExitStack()
        self.prepared.enter_context(acceleration.for_sampling(self.trunk, self.row_tokens))

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n, C) float64; texts beyond the length that the classifier was trained on are cut there."""
        if not texts:
            return np.zeros((0, len(self.labels)))
        nothing = [self.tokenizer.eos_token_id]  # for a text of which the tokenizer makes no token
        paths = [ids[: self.max_length].tolist() or nothing for ids in encoded_text(list(texts), self.tokenizer)]
        scores = np.zeros((len(texts), len(self.labels)), np.float32)
        for row in self._rows(paths):
            trees = [_tree(paths[i]) for i in row]
            if self.trunk.packed:
                forest = plant(graft(trees), multiple=self.trunk.row_multiple).to(self.trunk.device)
            else:
                forest = plant(trees, packed=False).to(self.trunk.device)
            scores[np.array(row)[forest.owner.cpu()]] = self.trunk(forest).float().cpu().numpy()
        return softmax(scores)

    def _rows(self, paths: list[list[int]]) -> list[list[int]]:
        """Texts that are computed together: those that begin alike, for a beginning is then computed once; or of like
        length, where rows are padded."""
        if not self.trunk.packed:
            return pack_padded([len(ids) for ids in paths], self.row_tokens)
        rows, room = [], 0
        for i in sorted(range(len(paths)), key=paths.__getitem__):
            if len(paths[i]) > room:
                rows.append([])
                room = self.row_tokens
            rows[-1].append(i)
            room -= len(paths[i])
        return rows

    def checked(self, row: Text) -> Text:
        """The row; without its text where that cannot be read, or has a token that the model does not know."""
        if row.text is None:
            return row
        try:
            controls_of(self.tokenizer).disguised(row.text)
        except Unwritable as error:
            return Text(row.line, None, str(error))
        (ids,) = encoded_text([row.text], self.tokenizer)
        fault = token_without_row(self.tokenizer, ids.tolist(), self.trunk.rows)
        return Text(row.line, None, fault) if fault else row

    def label(self, probabilities: np.ndarray) -> str:
        """The label of one text, (C,), by the saved threshold if there is one."""
        if self.threshold is not None:
            return self.labels[int(probabilities[1] >= self.threshold)]
        return self.labels[int(probabilities.argmax())]


def predict_command(argv: Sequence[str]) -> None:
    """`--predict FOLDER [FILE]`. What a user can mend goes to stderr, with exit status 2."""
    parser = Parser("python -m align.classify", description=__doc__)
    parser.add_argument("--predict", metavar="FOLDER", required=True, help="final/ of a finished run")
    parser.add_argument("file", nargs="?", help="what to classify; standard input where it is left out")
    parser.add_argument("--text", metavar="COLUMN", default="text", help="column of the texts: a name, or column2")
    parser.add_argument("--format", choices=WRITERS, default="csv", help="of the output (default: csv)")
    parser.add_argument("--base", metavar="BASE", help="the base, where the one that the result names is not here")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that stands beside the base")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep_freed_memory()
    with border("classify fewer texts at once, or shorter ones", result=True):
        options = parser.parse_args(argv)
        file = None if options.file is None else expanded(options.file)
        folder = Path(expanded(options.predict))
        texts = _texts(file, options.text)
        first = list(islice(texts, 1))  # a fault of the file is told before the model is loaded
        classifier = Classifier(folder, options.base and location(options.base), options.trust_remote_code)
        _write(classifier, chain(first, texts), file or "<stdin>", options.format)


def _write(classifier: Classifier, texts: Iterator[Text], name: str, format: str) -> None:
    shown = printable if sys.stdout.isatty() else str  # a terminal would act on control characters, a file takes them
    write = WRITERS[format](sys.stdout, [*map(shown, classifier.labels)])
    rows = without = 0
    fault: UserError | None = None
    while window := _window(texts):
        if isinstance(window[-1], UserError):  # nothing after it can be read; what came before has its labels
            fault = window.pop()
        window = [classifier.checked(row) for row in window]
        known = iter(classifier.probabilities([row.text for row in window if row.text is not None]))
        for row in window:
            probabilities = None if row.text is None else next(known)
            why = row.fault
            if probabilities is not None and not np.isfinite(probabilities).all():
                probabilities, why = None, "the model's scores of it are not finite"
            if probabilities is None:
                without += 1
                print(printable(f"{name}:{row.line}: {why}"), file=sys.stderr)
            label = None if probabilities is None else shown(classifier.label(probabilities))
            write(row.line, label, probabilities)
        rows += len(window)
        sys.stdout.flush()
        if fault:
            raise UserError(*fault.problems, f"{name}: stopped there; {rows:,} rows before it are written")
    if without or not rows:
        lost = f"{without:,} row{'s' * (without > 1)} without a label" if rows else "there is no row in it"
        print(printable(f"{name}: {lost}"), file=sys.stderr)


def _window(texts: Iterator[Text]) -> list[Text | UserError]:
    """The next rows; last of them the fault, where one ends the reading."""
    window: list[Text | UserError] = []
    try:
        window.extend(islice(texts, WINDOW))
    except UserError as error:
        window.append(error)
    return window


def _csv_writer(stream: TextIO, labels: list[str]) -> Callable[[int, str | None, np.ndarray | None], None]:
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["line", "label", *(f"p_{label}" for label in labels)])

    def write(line: int, label: str | None, probabilities: np.ndarray | None) -> None:
        shares = [""] * len(labels) if probabilities is None else [f"{p:.6g}" for p in probabilities]
        rows.writerow([line, label or "", *shares])

    return write


def _jsonl_writer(stream: TextIO, labels: list[str]) -> Callable[[int, str | None, np.ndarray | None], None]:
    def write(line: int, label: str | None, probabilities: np.ndarray | None) -> None:
        shares = None
        if probabilities is not None:
            shares = {name: float(f"{p:.6g}") for name, p in zip(labels, probabilities, strict=True)}
        record = {"line": line, "label": label, "probabilities": shares}
        stream.write(to_json(record) + "\n")

    return write


WRITERS = {"csv": _csv_writer, "jsonl": _jsonl_writer}


def _texts(file: str | None, column: str) -> Iterator[Text]:
    if file is None:
        return starmap(_raw, enumerate(sys.stdin.buffer, 1))
    paths = data_files(file)
    if len(paths) > 1:
        raise UserError(f"{file}: is a folder; give one file")
    name = paths[0].name.lower().removesuffix(".gz")
    return _lines(text_lines(paths[0])) if name.endswith(".txt") else _rows(paths[0], column)


def _lines(lines: Iterable[tuple[int, str]]) -> Iterator[Text]:
    for number, line in lines:
        yield _text(number, line.rstrip("\r\n"))


def _raw(number: int, line: bytes) -> Text:
    try:
        return _text(number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Text(number, None, f"not UTF-8 (byte 0x{line[error.start]:02x})")


def _rows(path: Path, column: str) -> Iterator[Text]:
    known = False
    for number, row in read_file(path, {"text": column}):
        if isinstance(row, dict):
            if not known and column not in row:
                raise UserError(
                    f"{path}: no column '{column}'{meant(column, row)}; it has {', '.join(row)}; name it with --text"
                )
            known = True
            yield _text(number, row.get(column))
        else:
            reason = row.reason if isinstance(row, Broken) else f"expected a row of named columns, found {a(row)}"
            yield Text(number, None, reason)


def _text(number: int, value: Any) -> Text:
    try:
        return Text(number, encodable("text", filled("text", value)))
    except Refused as refused:
        return Text(number, None, str(refused))


def _tree(ids: list[int]) -> Tree:
    return Tree((np.array(ids, np.int32),), (np.zeros(len(ids), bool),))


def _about(folder: Path) -> About:
    """align.json of a classifier. Raises UserError for a folder that is none."""
    about = read_about(folder, "--predict")
    if about is None:
        raise UserError(f"--predict: {folder} has no {META}; give the final/ folder of a finished run")
    if about.stage != "classify":
        raise UserError(f"--predict: {folder} is the result of align.{about.stage}, not of align.classify")
    if about.labels is None or about.max_length is None:
        raise UserError(f"--predict: {folder / META} has no labels and max_length, which a classifier needs")
    if about.threshold is not None and len(about.labels) != 2:
        raise UserError(
            f"--predict: {folder / META}: threshold goes with two labels, and there are {len(about.labels)}"
        )
    return about


def _fill(model: nn.Module, file: Path) -> None:
    """Give a whole model its weights, all of them and no others."""
    with foreign(f"--predict: {file} cannot be read"):
        weights = load_file(file)
    check_finite(weights, f"--predict: {file}")
    check_fit(weights, model.state_dict(), f"--predict: {file} does not fit its config.json")
    model.load_state_dict(weights)
