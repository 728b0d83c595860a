"""The one exception a user can cause, and text made safe to show. Programmers' mistakes stay `assert`s."""

from __future__ import annotations

import re

# C0 and C1 but for line breaks and tabs, what turns the direction of text, halves of surrogate pairs, other line breaks
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

SHOWN = 100  # characters of a user's word in a message


def printable(text: str) -> str:
    """Text as a terminal may be given it: control characters and the like are spelt out, as `\\x1b`.

    They would otherwise act: escape codes move the cursor, set the title or the clipboard, and overrides of direction
    show text that is not there. Line breaks and tabs stay, and so does text of any language.
    """
    return UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


def brief(text: str) -> str:
    """A word of the command line, or a key, as a message repeats it: cut where it is long."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


class UserError(ValueError):
    """Something the user can mend: each problem is one line that names the place, the fault and the remedy.

    The commands print the problems to stderr and exit with status 2, without a traceback. Whatever was put into a
    problem, it is one line that is safe to print.
    """

    def __init__(self, *problems: str) -> None:
        assert problems, "a UserError names at least one problem"
        self.problems = tuple(printable(problem).replace("\n", "\\n") for problem in problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:
        return UserError, self.problems  # as it comes from another process


def reason(error: BaseException) -> str:
    """An exception in a line: its type and the first line of what it says."""
    try:
        said = str(error).strip().splitlines()
    except BaseException:  # it cannot even say so
        said = []
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__
