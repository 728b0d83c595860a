"""The one exception a user can cause. Programmers' mistakes stay `assert`s."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: each problem is one line that names the place, the fault and the remedy.

    The commands print the problems to stderr and exit with status 2, without a traceback.
    """

    def __init__(self, *problems: str) -> None:
        assert problems, "a UserError names at least one problem"
        super().__init__("\n".join(problems))
        self.problems = problems
