"""Token trees: a stem of tokens with zero or more branches, packed end to end into rows without padding.

Shapes: T tokens in a row, n labelled positions, R rows (1 when packed).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tree(NamedTuple):
    """One example: `segments[0]` is the stem, the others are branches that continue it, each from the stem's end."""

    segments: tuple[np.ndarray, ...]  # each (length,) int32 token ids; branches may not be empty
    trained: tuple[np.ndarray, ...]  # each (length,) bool, True where the token is a label (to be predicted)
