"""Talk with a checkpoint, or with what a run left; or have a file of prompts answered.

    python -m align.chat MODEL [--adapter FOLDER]… [--compare MODEL]… [--system TEXT] [--temperature T] [--top-p P]
                               [--max-new N] [--beams K] [--seed S] [--dtype D] [--prompts FILE --output OUT.jsonl]

On a terminal, answers appear as they are sampled, those of several models side by side. Elsewhere each line of the
standard input is a user turn, and the answers go to the standard output.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from transformers.utils import logging

from align.models.sampling.choice import Sampling
from align.recipe.errors import UserError, printable
from align.recipe.paths import location
from align.tools.chat.answers import Answers
from align.tools.chat.batch import Task, answer_file, depends, find_prompts
from align.tools.chat.speaker import Speaker, load_speaker, load_speakers
from align.tools.chat.talk import Talk
from align.tools.chat.terminal import talk_in_lines, talk_on_terminal
from align.training.borders.border import Parser, border

TEMPERATURE, TOP_P, MAX_NEW = 0.7, 0.95, 512


class Command(NamedTuple):
    """What the command line asks for."""

    model: str
    adapters: list[str]
    others: list[str]  # models to compare it with
    system: str
    sampling: Sampling
    seed: int
    prompts: str | None  # a file of them, answered in `output`
    output: str | None
    dtype: str
    trust: bool  # code beside the base may run


def parse(argv: Sequence[str]) -> Command:
    """Raises UserError with every problem."""
    parser = Parser(prog="python -m align.chat", description="Talk with a model.", allow_abbrev=False)
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, hub id or demo/smollm2-135m; or a run, or its final/"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="final/ of a run, to act on MODEL; of several, in the order of training, all but the last are merged",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="MODEL",
        help="another model, answering side by side; again for more",
    )
    parser.add_argument("--prompts", metavar="FILE", help="answer its rows: JSONL, CSV, Parquet, text, and others")
    parser.add_argument("--output", metavar="OUT.jsonl", help="a line for each row of --prompts")
    parser.add_argument("--system", default="", help="what the model is told before all turns")
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest token (default: {TEMPERATURE})")
    parser.add_argument("--top-p", type=float, help=f"only the likeliest of this share (default: {TOP_P})")
    parser.add_argument("--max-new", type=int, default=MAX_NEW, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=1, help="above 1: search the likeliest answer with so many")
    parser.add_argument("--seed", type=int, default=0, help="fixes the answers (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the computation")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that stands beside the base")
    given = parser.parse_args(argv)
    drawn = (given.temperature, given.top_p)
    temperature, top_p = (default if x is None else x for x, default in zip(drawn, (TEMPERATURE, TOP_P), strict=True))
    faults = {
        "--prompts and --output go together: a file to read, and one to write": (given.prompts is None)
        != (given.output is None),
        "--prompts: one model answers a file; leave --compare out": given.prompts is not None and given.compare,
        "--temperature: 0 or more": not 0 <= temperature < math.inf,
        "--top-p: above 0, and 1 at most": not 0 < top_p <= 1,
        "--max-new: 1 or more": given.max_new < 1,
        "--beams: 1 or more": given.beams < 1,
        "--seed: from 0 to 4294967295": not 0 <= given.seed < 2**32,
        "--system: this is not UTF-8 text": re.search("[\ud800-\udfff]", given.system),
        "--beams: a search draws nothing; leave --temperature and --top-p out": given.beams > 1
        and drawn != (None,) * 2,
    }
    if any(faults.values()):
        raise UserError(*(fault for fault, is_one in faults.items() if is_one))
    how = Sampling(given.max_new, temperature=temperature, top_p=top_p)
    if given.beams > 1:
        how = Sampling(given.max_new, temperature=0, beams=given.beams)
    model, adapters, others = location(given.model), [*map(location, given.adapter)], [*map(location, given.compare)]
    system, files = given.system.strip(), (given.prompts and location(given.prompts), given.output)
    return Command(model, adapters, others, system, how, given.seed, *files, given.dtype, given.trust_remote_code)


def speakers(command: Command) -> list[Speaker]:
    """The models that answer. Raises UserError for what is not there, or does not answer."""
    draws = command.sampling.beams == 1
    if command.others and draws and not command.adapters:
        return load_speakers([command.model, *command.others], command.dtype, command.trust)
    named = [(command.model, command.adapters), *((name, []) for name in command.others)]
    return [load_speaker(name, own, command.dtype, command.trust, draws) for name, own in named]


def answer_prompts(command: Command) -> None:
    """The file of answers. What cannot be read or written is told before the model is loaded."""
    answers, (source, found) = Answers(command.output), find_prompts(command.prompts)
    print(*map(printable, map(str, found)), sep="\n", file=sys.stderr)
    task = Task(source, command.sampling, command.seed, command.system)
    (speaker,) = speakers(command)
    with answers.open(depends(speaker, task, found)):
        answer_file(speaker, task, answers)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with border("choose a smaller model, or a smaller --max-new", result=True):
        command = parse(sys.argv[1:] if argv is None else argv)
        if command.prompts is not None:
            answer_prompts(command)
            return
        talks = [Talk(each, command.sampling, command.seed, command.system) for each in speakers(command)]
        if sys.stdin.isatty():
            talk_on_terminal(talks)
        else:
            talk_in_lines(talks)


if __name__ == "__main__":
    main()
