"""What a stage reads: which formats it knows, what becomes of a row, and what must be true of all rows together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerBase

from align.data.formats.rows import Fault, Formats, Row
from align.data.trees import Tree

if TYPE_CHECKING:
    from align.data.examples import Examples


class Reading(NamedTuple):
    """A way to read rows; each stage has its own."""

    name: str  # with its settings: all that tokens depend on besides source and tokenizer
    formats: Formats
    render: Callable[[list[Row], PreTrainedTokenizerBase], list[Tree | Fault]]
    chunks: bool = False  # whether long texts may be learnt in several examples
    survey: Callable[[Examples, Examples], list[str]] | None = None  # of train and eval: lines for the screen
