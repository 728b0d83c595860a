"""Talking at a terminal with one model, or with several side by side."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from align.recipe.errors import UserError, printable
from align.recipe.paths import expanded
from align.recipe.records import to_json
from align.tools.chat.side import Columns
from align.tools.chat.talk import Answer, Coming, Talk, hear
from align.tools.chat.typed import reader, typed
from align.training.borders.stops import signals

HELP = '''/system TEXT  what the model is told before all turns, from now on; without TEXT, nothing
/reset        forget all turns
/save FILE    write the conversation as a line of a new JSONL file, which align.sft reads
/help         this
"""           begins a turn of several lines, and ends it
Ctrl-C stops an answer, Ctrl-D leaves.'''


def talk_on_terminal(talks: Sequence[Talk]) -> None:
    """Until Ctrl-D."""
    read = reader()
    print(f"{printable(', '.join(talk.speaker.name for talk in talks))}. /help lists the commands, Ctrl-D leaves.")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            text, block = typed(read)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if text.startswith("/") and not block:
                obey(talks, *text.partition(" ")[::2])
            elif text and signal.SIGTERM in tell(talks, text):
                return
        except UserError as error:
            print("\n".join(error.problems))
        except KeyboardInterrupt:  # a second one does not wait for the next token
            print("\n(stopped; this turn is not kept)")


def tell(talks: Sequence[Talk], text: str) -> list[int]:
    """Ask, and print the answers as they come; the signals that came meanwhile."""
    with signals() as came:
        if len(talks) == 1:
            answer = talks[0].ask(text, lambda piece: print(shown(piece), end="", flush=True), lambda: came)
            print(f"\n{_note(talks[0], answer)}".rstrip())
            return came
        with Columns([talk.speaker.name for talk in talks]) as columns:
            coming: dict[int, Coming] = {}
            for number, talk in enumerate(talks):
                try:
                    coming[number] = talk.begin(text, partial(columns.say, number))
                except UserError as error:
                    columns.notes[number] = f"({error.problems[0]})"
            for number, answer in zip(coming, hear(list(coming.values()), lambda: came), strict=True):
                columns.notes[number] = _note(talks[number], answer)
    return came


def shown(text: str) -> str:
    """What a model wrote, for the standard output: a terminal would act on control characters, a file takes them."""
    return printable(text) if sys.stdout.isatty() else text


def _note(talk: Talk, answer: Answer) -> str:
    """Why the answer is not whole, where it is not."""
    room = talk.speaker.room
    match answer.end:
        case "stopped":
            return "(stopped)"
        case "max_new":
            return f"(cut off after {talk.sampling.max_new} tokens: --max-new)"
        case "context":
            return f"(cut off: the model's {room:,} positions are full; /save keeps the talk, /reset begins anew)"
    return "" if answer.text else "(no answer)"


def obey(talks: Sequence[Talk], command: str, words: str) -> None:
    """One of the commands in HELP."""
    words = words.strip()
    if command == "/system":
        for talk in talks:
            talk.system = words
    elif command == "/reset":
        for talk in talks:
            talk.turns = []
    elif command == "/save":
        save(talks, words)
    elif command == "/help":
        print(HELP)
    else:
        raise UserError(f"there is no command {command}; /help lists them")


def save(talks: Sequence[Talk], name: str) -> None:
    """Each model's conversation as one row of messages, with its name where there are several."""
    path = Path(expanded(name))
    if path.suffix != ".jsonl":
        raise UserError("/save FILE: the file's name is to end in .jsonl")
    said = [talk for talk in talks if talk.turns]
    if not said:
        raise UserError("/save: nothing has been said yet")
    try:
        with path.open("x", encoding="utf-8") as file:
            for talk in said:
                named = {"model": talk.speaker.name} if len(talks) > 1 else {}
                file.write(to_json({"messages": talk.messages} | named) + "\n")
    except FileExistsError:
        raise UserError(f"/save: {name} is already there; choose another name") from None
    except OSError as error:
        raise UserError(f"/save: {name}: {error.strerror}") from None
    print(printable(f"saved: {path}"))


def talk_in_lines(talks: Sequence[Talk]) -> None:
    """A user turn a line of standard input; answers alone are written, those of several models as a line of JSON."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip()
        if line.encode() not in raw:
            print(f"standard input:{number}: bytes that are not UTF-8 are read as \ufffd", file=sys.stderr, flush=True)
        if not line:
            continue
        try:
            answers = [talk.ask(line, lambda _piece: None).text for talk in talks]
        except UserError as error:
            raise UserError(*(f"standard input:{number}: {problem}" for problem in error.problems)) from None
        if len(talks) == 1:
            print(shown(answers[0]), flush=True)
        else:
            told = [{"model": talk.speaker.name, "content": text} for talk, text in zip(talks, answers, strict=True)]
            print(shown(to_json({"prompt": line, "answers": told})), flush=True)
