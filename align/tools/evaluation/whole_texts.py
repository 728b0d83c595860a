"""Perplexity of a file as one text: exp of the mean negative log-likelihood of every token after the first.

A text that is longer than a window is read through overlapping ones, each half a window on. A token is scored once, in
the first window that holds it, so it sees half a window of what stands before it at least (all of it in the first
window). No token is added but those that the tokenizer adds to any text; in particular nothing says that the text ends.
Of a text that fits one window this is plain transformers' `exp(model(ids, labels=ids).loss)`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.files.files import text_lines
from align.data.trees import Forest, Tree
from align.models.trunk import Trunk
from align.objectives.losses import path_sums
from align.recipe.errors import UserError
from align.training.batches import Batches
from align.training.bootstrap import Estimate
from align.training.screen import Screen


class Windows:
    """One text as overlapping windows, each a tree of a stem alone: examples of which rows are made."""

    def __init__(self, ids: np.ndarray, width: int) -> None:
        """`ids`: (n,) int32, n > 1; `width`: most tokens of a window, > 1."""
        self.ids, step = ids, max(width // 2, 1)
        last = max(0, math.ceil((len(ids) - width) / step))  # the first window that reaches the end
        self.begins = np.arange(last + 1) * step
        self.ends = np.minimum(self.begins + width, len(ids))
        self.lengths = self.longest = self.room = (self.ends - self.begins).astype(np.int64)
        self.paths = np.ones(len(self.begins), np.int64)

    def __len__(self) -> int:
        return len(self.begins)

    def tree(self, i: int) -> Tree:
        """Window `i`, its labels the tokens that no earlier window holds."""
        begin, end = int(self.begins[i]), int(self.ends[i])
        new = np.arange(begin, end) >= (self.ends[i - 1] if i else 1)
        return Tree((self.ids[begin:end],), (new,))


def read_whole(path: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens of a text file, (n,) int32. Raises UserError for one that cannot be read, or has no second token."""
    text = "".join(line for _, line in text_lines(Path(path)))
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
    if len(ids) < 2:
        raise UserError(f"evaluate.whole_texts: {path} has {len(ids)} token(s); perplexity needs two or more")
    return ids


def whole_perplexity(batches: Batches, ids: np.ndarray, width: int, screen: Screen) -> Estimate:
    """Of one text, (n,) int32. It is one draw, so there is no interval."""
    positions = getattr(batches.trunk.plain.config.get_text_config(), "max_position_embeddings", None)
    windows = Windows(ids, max(2, min(width, positions or width)))

    def numbers(trunk: Trunk, forest: Forest) -> Tensor:
        return path_sums(trunk(forest), forest.path, forest.paths)

    lines = batches.each(windows, np.arange(len(windows)), numbers, screen, "perplexity of a whole text")
    nll = -math.fsum(float(line.double().sum()) for line in lines)
    return Estimate(math.exp(nll / (len(ids) - 1)), math.nan, math.nan, 1)
