"""Functions of the user's own, which a recipe names as `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from align.recipe.errors import UserError

Border = Callable[[str, Callable[[], Any]], Any]
"""What foreign code is called through: `border(what went wrong, call)` gives what `call` gives, or raises UserError."""


def imported(name: str, key: str, border: Border) -> Callable[..., Any]:
    """The function that the recipe's `key` names. Raises UserError where there is none."""
    module, _, attribute = name.partition(":")
    found = border(f"{key}: {module} cannot be imported", lambda: importlib.import_module(module))
    function = border(f"{key}: {module} has no function {attribute!r}", lambda: getattr(found, attribute, None))
    if not callable(function):
        raise UserError(f"{key}: {module} has no function {attribute!r}")
    return function
