"""Talk with a checkpoint, or with what a run left.

    python -m align.chat MODEL [--adapter FOLDER]… [--system TEXT] [--temperature T] [--top-p P] [--max-new N]
                               [--beams K] [--seed S]

On a terminal, answers appear as they are sampled. Elsewhere each line of the standard input is a user turn, and the
answers go to the standard output.
"""

from __future__ import annotations

import math
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from transformers.utils import logging

from align.models.sampling.choice import Sampling
from align.recipe.errors import UserError, printable
from align.recipe.paths import expanded, location
from align.recipe.records import to_json
from align.tools.chat.talk import Answer, Talk
from align.tools.chat.talker import load_talker
from align.training.borders.border import Parser, border
from align.training.borders.stops import signals

TEMPERATURE, TOP_P, MAX_NEW = 0.7, 0.95, 512
HELP = """/system TEXT  what the model is told before all turns, from now on; without TEXT, nothing
/reset        forget all turns
/save FILE    write the conversation as a line of a new JSONL file, which align.sft reads
/help         this
Ctrl-C stops an answer, Ctrl-D leaves."""


class Command(NamedTuple):
    """What the command line asks for."""

    model: str
    adapters: list[str]
    system: str
    sampling: Sampling
    seed: int
    trust: bool  # code beside the base may run


def talk_on_terminal(talk: Talk, model: str) -> None:
    """Until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (`input` then edits lines, and has those before)
    print(f"{printable(model)}. /help lists the commands, Ctrl-D leaves.")
    with suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                obey(talk, *line.partition(" ")[::2])
            elif line and signal.SIGTERM in tell(talk, line):
                return
        except UserError as error:
            print("\n".join(error.problems))
        except KeyboardInterrupt:  # a second one does not wait for the next token
            print("\n(stopped; this turn is not kept)")


def tell(talk: Talk, text: str) -> list[int]:
    """Ask, and print the answer as it comes; the signals that came meanwhile."""
    with signals() as came:
        answer = talk.ask(text, lambda piece: print(_shown(piece), end="", flush=True), lambda: came)
    print(f"\n{_note(talk, answer)}".rstrip())
    return came


def _shown(text: str) -> str:
    """What a model wrote, for the standard output: a terminal would act on control characters, a file takes them."""
    return printable(text) if sys.stdout.isatty() else text


def _note(talk: Talk, answer: Answer) -> str:
    """Why the answer is not whole, where it is not."""
    match answer.end:
        case "stopped":
            return "(stopped)"
        case "max_new":
            return f"(cut off after {talk.sampling.max_new} tokens: --max-new)"
        case "context":
            return f"(cut off: the model's {talk.room:,} positions are full; /save keeps the talk, /reset begins anew)"
    return "" if answer.text else "(no answer)"


def obey(talk: Talk, command: str, words: str) -> None:
    """One of the commands in HELP."""
    words = words.strip()
    if command == "/system":
        talk.system = words
    elif command == "/reset":
        talk.turns = []
    elif command == "/save":
        save(talk, words)
    elif command == "/help":
        print(HELP)
    else:
        raise UserError(f"there is no command {command}; /help lists them")


def save(talk: Talk, name: str) -> None:
    """The conversation as one row of messages."""
    path = Path(expanded(name))
    if path.suffix != ".jsonl":
        raise UserError("/save FILE: the file's name is to end in .jsonl")
    if not talk.turns:
        raise UserError("/save: nothing has been said yet")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_json({"messages": talk.messages}) + "\n")
    except FileExistsError:
        raise UserError(f"/save: {name} is already there; choose another name") from None
    except OSError as error:
        raise UserError(f"/save: {name}: {error.strerror}") from None
    print(printable(f"saved: {path}"))


def talk_in_lines(talk: Talk) -> None:
    """A user turn a line; the answers alone are written."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
        if line.encode() not in raw:
            print(f"standard input:{number}: bytes that are not UTF-8 are read as \ufffd", file=sys.stderr, flush=True)
        if line:
            try:
                answer = talk.ask(line, lambda _piece: None)
            except UserError as error:
                raise UserError(*(f"standard input:{number}: {problem}" for problem in error.problems)) from None
            print(_shown(answer.text), flush=True)


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
    parser.add_argument("--system", default="", help="what the model is told before all turns")
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest token (default: {TEMPERATURE})")
    parser.add_argument("--top-p", type=float, help=f"only the likeliest of this share (default: {TOP_P})")
    parser.add_argument("--max-new", type=int, default=MAX_NEW, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=1, help="above 1: search the likeliest answer with so many")
    parser.add_argument("--seed", type=int, default=0, help="fixes the answers (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that stands beside the base")
    given = parser.parse_args(argv)
    drawn = (given.temperature, given.top_p)
    temperature, top_p = (default if x is None else x for x, default in zip(drawn, (TEMPERATURE, TOP_P), strict=True))
    faults = {
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
    model, adapters = location(given.model), [*map(location, given.adapter)]
    return Command(model, adapters, given.system.strip(), how, given.seed, given.trust_remote_code)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with border("choose a smaller model, or a smaller --max-new", result=True):
        command = parse(sys.argv[1:] if argv is None else argv)
        trunk = load_talker(command.model, command.adapters, Accelerator(mixed_precision="no"), command.trust)
        talk = Talk(trunk, command.sampling, command.seed, command.system)
        if sys.stdin.isatty():
            talk_on_terminal(talk, command.model)
        else:
            talk_in_lines(talk)


if __name__ == "__main__":
    main()
