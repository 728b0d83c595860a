"""What a stage reads: which formats it knows, and what becomes of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from align.data.rows import Fault, Formats, Row
from align.data.trees import Tree


class Reading(NamedTuple):
    """A way to read rows; each stage has its own."""

    name: str  # with its settings: all that tokens depend on besides source and tokenizer
    formats: Formats
    render: Callable[[list[Row], PreTrainedTokenizerBase], list[Tree | Fault]]
