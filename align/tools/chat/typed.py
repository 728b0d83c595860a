"""What a person types at a terminal: turns of one line or several."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

QUOTES = '"""'  # around a turn of several lines
Read = Callable[[str], str]


class Typed(NamedTuple):
    """A turn, or a command."""

    text: str
    block: bool  # it stood in quotes: no command, whatever it begins with


def typed(read: Read) -> Typed:
    """The next turn. Raises EOFError at the end of the input, and KeyboardInterrupt where it was broken off."""
    line = read("> ").strip()
    if not line.startswith(QUOTES):
        return Typed(line, False)
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].endswith(QUOTES):
        lines.append(read("... ").rstrip())
    lines[-1] = lines[-1].removesuffix(QUOTES)
    return Typed("\n".join(lines).strip(), True)


def reader() -> Read:
    """How a line is read: by prompt_toolkit where that is installed, else as `input` does it.

    With prompt_toolkit a pasted text may have several lines, Alt+Enter begins another one, and Enter sends.
    """
    if not _is_terminal():
        return input
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ImportError:
        with suppress(ImportError):
            import readline  # noqa: F401  (`input` then edits lines, and has those before)
        return input
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys, prompt_continuation="... ")
    return session.prompt


def _is_terminal() -> bool:
    """Whether keys come from a terminal and the screen is one; a dumb one cannot move its cursor."""
    try:
        return os.isatty(sys.stdin.fileno()) and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")
    except (OSError, ValueError, AttributeError):
        return False
