"""Talk with a checkpoint, or with what a run left.

    python -m align.chat MODEL [--adapter FOLDER]… [--system TEXT] [--temperature T] [--top-p P] [--max-new N]
                               [--beams K] [--seed S]

On a terminal, answers appear as they are sampled. Elsewhere each line of the standard input is a user turn, and the
answers go to the standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from transformers.utils import logging

from align.models.sampling import Sampling
from align.recipe.errors import UserError
from align.tools.talk import Answer, Talk
from align.tools.talker import load_talker
from align.training.stops import signals

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


def talk_on_terminal(talk: Talk, model: str) -> None:
    """Until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (`input` then edits lines, and has those before)
    print(f"{model}. /help lists the commands, Ctrl-D leaves.")
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
        answer = talk.ask(text, lambda piece: print(piece, end="", flush=True), lambda: came)
    print(f"\n{_note(talk, answer)}".rstrip())
    return came


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
    path = Path(name).expanduser()
    if path.suffix != ".jsonl":
        raise UserError("/save FILE: the file's name is to end in .jsonl")
    if not talk.turns:
        raise UserError("/save: nothing has been said yet")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise UserError(f"/save: {name} is already there; choose another name") from None
    except OSError as error:
        raise UserError(f"/save: {name}: {error.strerror}") from None
    print(f"saved: {path}")


def talk_in_lines(talk: Talk) -> None:
    """A user turn a line; the answers alone are written."""
    for number, line in enumerate(sys.stdin, 1):
        if line.strip():
            try:
                answer = talk.ask(line.strip(), lambda _piece: None)
            except UserError as error:
                raise UserError(*(f"standard input:{number}: {problem}" for problem in error.problems)) from None
            print(answer.text, flush=True)


def parse(argv: Sequence[str]) -> Command:
    """Raises UserError with every problem."""
    parser = _Parser(prog="python -m align.chat", description="Talk with a model.", allow_abbrev=False)
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, hub id or demo/smollm2-135m; or a run, or its final/"
    )
    parser.add_argument(
        "--adapter", action="append", default=[], help="final/ of a run, to act on MODEL; twice: the first is merged"
    )
    parser.add_argument("--system", default="", help="what the model is told before all turns")
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest token (default: {TEMPERATURE})")
    parser.add_argument("--top-p", type=float, help=f"only the likeliest of this share (default: {TOP_P})")
    parser.add_argument("--max-new", type=int, default=MAX_NEW, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=1, help="above 1: search the likeliest answer with so many")
    parser.add_argument("--seed", type=int, default=0, help="fixes the answers (default: %(default)s)")
    given = parser.parse_args(argv)
    drawn = (given.temperature, given.top_p)
    temperature, top_p = (default if x is None else x for x, default in zip(drawn, (TEMPERATURE, TOP_P), strict=True))
    faults = {
        "--temperature: 0 or more": not 0 <= temperature < math.inf,
        "--top-p: above 0, and 1 at most": not 0 < top_p <= 1,
        "--max-new: 1 or more": given.max_new < 1,
        "--beams: 1 or more": given.beams < 1,
        "--seed: from 0 to 4294967295": not 0 <= given.seed < 2**32,
        "--beams: a search draws nothing; leave --temperature and --top-p out": given.beams > 1
        and drawn != (None,) * 2,
    }
    if any(faults.values()):
        raise UserError(*(fault for fault, is_one in faults.items() if is_one))
    how = Sampling(given.max_new, temperature=temperature, top_p=top_p)
    if given.beams > 1:
        how = Sampling(given.max_new, temperature=0, beams=given.beams)
    return Command(given.model, given.adapter, given.system.strip(), how, given.seed)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        trunk = load_talker(command.model, command.adapters, Accelerator(mixed_precision="no"))
        talk = Talk(trunk, command.sampling, command.seed, command.system)
        if sys.stdin.isatty():
            talk_on_terminal(talk, command.model)
        else:
            talk_in_lines(talk)
    except (UserError, UnicodeDecodeError) as error:
        problems = error.problems if isinstance(error, UserError) else ["standard input: not UTF-8 text"]
        print("\n".join(problems), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except (torch.OutOfMemoryError, MemoryError):
        print("out of memory: choose a smaller model, or a smaller --max-new", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except BrokenPipeError:  # who read the answers has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
