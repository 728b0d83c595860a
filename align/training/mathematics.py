"""Whether two texts are equal as mathematics, by math-verify."""

from __future__ import annotations

import logging
from functools import lru_cache
from threading import current_thread, main_thread
from typing import Any

SECONDS = 2  # that math-verify may take for one expression


def equal(response: str, reference: str) -> bool:
    """Whether math-verify finds both to be the same number or expression. Of a reference with `####` in it, what stands
    behind that counts, as in GSM8K (arXiv 2110.14168). Raises ImportError without math-verify."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each text that it gives up
    if not (wanted := _wanted(reference)):
        return False
    return bool(verify(wanted, parse(response, parsing_timeout=_seconds()), timeout_seconds=_seconds()))


@lru_cache(maxsize=4096)
def _wanted(reference: str) -> list[Any]:
    from math_verify import parse

    text = reference.rpartition("####")[2]
    bare = "\\" in text and "$" not in text and "\\boxed" not in text  # LaTeX without its signs
    return parse(f"${text}$" if bare else text, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """Kept by a signal, which a thread cannot have."""
    return SECONDS if current_thread() is main_thread() else None
