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
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from transformers.utils import logging

from align.data.files.files import read_file, text_lines
from align.data.files.lines import Broken
from align.data.files.paths import data_files
from align.data.formats.rows import Refused
from align.data.formats.shown import a, meant
from align.data.formats.values import encodable, filled
from align.recipe.errors import UserError, printable
from align.recipe.paths import expanded, location
from align.recipe.records import to_json
from align.training.borders.border import Parser, border
from align.training.heap import keep_freed_memory
from align.training.labelling.classifier import Classifier, Text

WINDOW = 4096  # texts that are read and sorted into rows at once


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
