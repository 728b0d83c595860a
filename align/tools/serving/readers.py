"""Classifiers on a trunk of their own: on an encoder, which reads a text as a whole, or with all weights trained.

They cannot be rows of the running batch. Their texts are computed between two of its steps, a portion at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from align.models.base import base_config
from align.models.checkpoints.adapters import trunk_of
from align.models.checkpoints.results import read_about, read_result
from align.models.sampling.pools import Pools
from align.models.sampling.prefixes import Prefixes
from align.models.sampling.running import Running
from align.models.scoring import is_encoder
from align.recipe.errors import UserError

PORTION = 512  # tokens that are computed at once: answers wait so long


def reads_alone(folder: str, key: str, base: str | None, trust: bool) -> bool:
    """Whether a folder holds such a classifier. `base`: what the user names. Raises UserError for a damaged result."""
    about = read_about(Path(folder), key)
    if about is None or about.stage != "classify":
        return False
    if about.role == "model":
        return True
    result = read_result(folder, key)
    try:
        section = trunk_of(result, key, "give --base", None, trust)
    except UserError:
        if base is None:
            raise
        section = trunk_of(result, key, "give --base", base, trust)
    return is_encoder(base_config(section, True))


def portions(paths: list[list[int]]) -> Iterator[list[list[int]]]:
    """Texts as token ids, in their order, few at a time."""
    portion: list[list[int]] = []
    for ids in paths:
        if portion and sum(map(len, portion)) + len(ids) > PORTION:
            yield portion
            portion = []
        portion.append(ids)
    if portion:
        yield portion


class NoRows(Running):
    """The running batch of a server on which no model answers: nothing joins it."""

    def __init__(self) -> None:
        self.waiting, self.filling, self.going, self.retired = [], [], [], set()
        self.pools, self.prefixes = Pools(0, 0), Prefixes(0)

    def step(self) -> list:
        return []

    def close(self) -> None:
        pass
