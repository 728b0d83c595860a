"""Token trees as `--show` prints them: their text, with the trained tokens marked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.data.trees import Tree
from align.recipe.errors import printable


def show(tree: Tree, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """The tree's text with its trained tokens green, or, without colour, between ⟦ and ⟧; branches by name."""
    stem, *branches = tree.segments
    shown = _marked(stem, tree.trained[0], 0, tokenizer, colour)
    shown.rstrip()
    for name, ids, trained in zip(_names(tree), branches, tree.trained[1:], strict=True):
        shown.append(f"\n── {name} ──\n", style="bold" if colour else None)
        path, marks = np.concatenate([stem, ids]), np.concatenate([np.zeros(len(stem), bool), trained])
        shown.append_text(_marked(path, marks, len(stem), tokenizer, colour))
    return shown


def _names(tree: Tree) -> list[str]:
    """What the branches are called."""
    count = len(tree.segments) - 1
    if count == 1:
        return ["answer" if not tree.targets else "desirable" if tree.targets[0] else "undesirable"]
    if count == 2:
        return [f"chosen, by a margin of {tree.targets[0]:g}" if tree.targets else "chosen", "rejected"]
    return [f"answer {i + 1} of {count}" for i in range(count)]


def _marked(ids: np.ndarray, trained: np.ndarray, start: int, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    """The text of the tokens from `start` on."""
    shown = Text()
    edges = [start, *(start + 1 + np.flatnonzero(np.diff(trained[start:]))), len(ids)]
    # Decoded from the beginning, for many decoders write the first token of a text without its space.
    written = tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
    for first, last in pairwise(edges):
        text = tokenizer.decode(ids[:last], clean_up_tokenization_spaces=False)
        run, written = printable(text[len(written) :]), text
        marked = f"⟦{run}⟧" if trained[first] and not colour else run
        shown.append(marked, style="green" if trained[first] and colour else None)
    return shown
