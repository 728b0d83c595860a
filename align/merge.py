"""Merge what a run left into its base, as an ordinary checkpoint that any program loads.

    python -m align.merge RESULT [RESULT …] OUT [--dtype float32|bfloat16|float16] [--onto BASE [--onto FOLDER …]]
                          [--average linear|ties|dare_linear|dare_ties --weight W … --density D --seed S]
                          [--gguf TYPE] [--modelfile] [--trust-remote-code]

RESULT is the `final/` of a run, or the run. Base and earlier adapters are those that it was trained on; `--onto` names
them where they are elsewhere. Each merge is done in float32 and compared with the adapter unmerged; what was written is
loaded again by plain transformers and compared with the unmerged model. A difference that is more than rounding is an
error, and then nothing is left in OUT.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging

from align.models.checkpoints.results import CONFIG
from align.models.checkpoints.sources import is_file
from align.recipe.errors import UserError, printable
from align.recipe.paths import location
from align.recipe.records import to_json
from align.tools.merging.averages import KINDS, Average
from align.tools.merging.card import card
from align.tools.merging.chain import merged_chain, read_results
from align.tools.merging.checkpoint import refuse_taken, sizes, write
from align.tools.merging.export import GGUF_TYPES, converter, modelfile, to_gguf
from align.training.borders.border import Parser, border, shows
from align.training.runs.durable import published

DTYPES = ("float32", "bfloat16", "float16")


class Command(NamedTuple):
    """What the command line asks for."""

    results: list[str]
    out: Path
    dtype: str
    onto: list[str]
    average: Average
    gguf: str | None
    modelfile: bool
    trust: bool


def run(command: Command) -> None:
    """The merge, from results to a checked checkpoint."""
    refuse_taken(command.out)
    script = converter() if command.gguf else None
    results = read_results(command.results)
    last, several = results[0], len(results) > 1
    if command.modelfile and last.about.stage in ("reward", "classify"):
        raise UserError("--modelfile: a model that only scores texts does not chat")

    # 1. The chain in float32, every link compared with the adapter unmerged.
    whole = merged_chain(results, command.onto, command.trust, command.average)
    for step in whole.steps:
        say(f"merged {step.name}: {step.difference}")
        if step.untied:
            say(f"untied: {step.name} changes only one of embeddings and head, so each has weights of its own now")

    # 2. The checkpoint in its dtype, loaded again and compared.
    weights, size = sizes(whole.model)
    with published(command.out, size) as folder:
        on_disk, remarks = write(whole, last, folder, getattr(torch, command.dtype), command.trust)
        say(f"written in {command.dtype} and loaded again: {on_disk}")

        # 3. What it is, for people and for programs.
        average = command.average if several else None
        text = card(whole, last, average, on_disk, command.dtype, weights)
        (folder / "README.md").write_text(text, encoding="utf-8")
        steps = [{"name": step.name, **step.difference._asdict(), "untied": step.untied} for step in whole.steps]
        told = {"dtype": command.dtype, "weights": weights, "steps": steps, "on_disk": on_disk._asdict()}
        (folder / "merge.json").write_text(to_json(told, indent=1), encoding="utf-8")
        file = to_gguf(script, folder, command.gguf).name if script else "."
        if command.modelfile:
            ollama, why = modelfile(whole.tokenizer, whole.model.generation_config, file)
            (folder / "Modelfile").write_text(ollama, encoding="utf-8")
            remarks += [f"the Modelfile has no template: {why}"] if why else []
    for remark in remarks:
        say(remark)
    say(f"done: {command.out} ({weights:,} weights, {command.dtype})")


def say(line: str) -> None:
    """A line on the screen, with control characters spelt out."""
    print(printable(line), flush=True)


def parse(argv: Sequence[str]) -> Command:
    """Raises UserError with every problem."""
    parser = Parser(prog="python -m align.merge", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("results", metavar="RESULT", nargs="+", help="final/ of a run, or a run; several: averaged")
    parser.add_argument("out", metavar="OUT", help="a folder that is new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of what is written (default: %(default)s)")
    parser.add_argument(
        "--onto", action="append", default=[], metavar="BASE",
        help="the base, then every earlier adapter in the order of training, where they are not where RESULT says",
    )  # fmt: skip
    parser.add_argument("--average", choices=KINDS, help="how several results become one (default: linear)")
    parser.add_argument("--weight", action="append", type=float, help="of each result in turn (default: equal)")
    parser.add_argument("--density", type=float, help="share of values that ties and dare keep (default: 0.5)")
    parser.add_argument("--seed", type=int, help="of what dare drops (default: 0)")
    parser.add_argument("--gguf", choices=GGUF_TYPES, help="convert it too, by llama.cpp's converter")
    parser.add_argument("--modelfile", action="store_true", help="write a Modelfile for Ollama")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that stands beside the base")
    given = parser.parse_args(argv)
    count, density = len(given.results), 0.5 if given.density is None else given.density
    weights = given.weight or [1 / count] * count
    of_average = [given.average, given.weight, given.density, given.seed]
    faults = {
        "--average, --weight, --density and --seed: they go with several results": count == 1
        and any(part is not None for part in of_average),
        f"--weight: one for each of the {count} results": len(weights) != count,
        "--weight: a finite number": not all(map(math.isfinite, weights)),
        "--density: above 0, and 1 at most": not 0 < density <= 1,
        "--density: `linear` keeps all": given.density is not None and (given.average or "linear") == "linear",
    }
    if any(faults.values()):
        raise UserError(*(fault for fault, is_one in faults.items() if is_one))
    return Command(
        [_result(location(name)) for name in given.results],
        Path(location(given.out)),
        given.dtype,
        [*map(location, given.onto)],
        Average(given.average or "linear", tuple(weights), density, given.seed or 0),
        given.gguf,
        given.modelfile,
        given.trust_remote_code,
    )


def _result(name: str) -> str:
    """Of a run its `final/`."""
    final = Path(name) / "final"
    return str(final) if not is_file(Path(name) / CONFIG) and is_file(final / CONFIG) else name


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    words = sys.argv[1:] if argv is None else argv
    with border("use a machine with more memory: a merge holds the whole model twice, in float32", result=shows(words)):
        run(parse(words))


if __name__ == "__main__":
    main()
