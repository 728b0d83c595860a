"""Which examples share a row, and the row as a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from align.data.graft import graft
from align.data.packing import pack, pack_padded
from align.data.trees import Forest, Tree, plant
from align.models.trunk import Trunk
from align.training.plan import row_budget
from align.training.screen import Screen


class Planted(Protocol):
    """Numbered examples, of which rows are made; n of them."""

    lengths: np.ndarray  # (n,) int64, distinct tokens of each
    longest: np.ndarray  # (n,) int64, tokens of its longest path
    paths: np.ndarray  # (n,) int64, its root-to-leaf paths
    room: np.ndarray  # (n,) int64, tokens that it takes in a packed row

    def tree(self, i: int) -> Tree:
        """Example `i`."""


class Batches:
    """Rows in the trunk's layout, shared out over the processes."""

    def __init__(self, trunk: Trunk, accelerator: Accelerator, row_tokens: int | str) -> None:
        self.trunk, self.row_tokens = trunk, row_budget(row_tokens, trunk.device)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def rows(self, examples: Planted, chosen: np.ndarray) -> list[list[int]]:
        """This process's share of the rows of `chosen`, (k,) int64; every process has the same number."""
        if self.trunk.packed:
            rows = pack(examples.room[chosen].tolist(), self.row_tokens, self.world)
        else:
            lengths, paths = examples.longest[chosen].tolist(), examples.paths[chosen].tolist()
            rows = pack_padded(lengths, self.row_tokens, self.world, paths)
        return [[int(chosen[i]) for i in row] for row in rows[self.rank :: self.world]]

    def each(
        self,
        examples: Planted,
        chosen: np.ndarray,
        function: Callable[[Trunk, Forest], Tensor],
        screen: Screen,
        what: str,
    ) -> list[Tensor]:
        """`function` of every chosen example, without gradient: in order, the lines of each one's paths, on the CPU.

        function(trunk, forest) -> (P, …), one line a path. Every process gets all; `what` is shown meanwhile.
        """
        mine: dict[int, Tensor] = {}
        training = self.trunk.training
        self.trunk.eval()
        with torch.no_grad(), screen.at_once():
            for row in screen.track(self.rows(examples, chosen), what):
                forest = self.plant(examples, row)
                lines, owner = function(self.trunk, forest).float().cpu(), forest.owner.cpu()
                mine |= {i: lines[owner == number] for number, i in enumerate(row)}
        self.trunk.train(training)
        everyone = {i: lines for part in gather_object([mine]) for i, lines in part.items()}
        return [everyone[int(i)] for i in chosen]

    def plant(self, examples: Planted, row: list[int]) -> Forest:
        """A row as a batch, where it is empty one of example 0."""
        trees = [examples.tree(i) for i in row or [0]]
        if self.trunk.packed:
            trees = graft(trees)
        multiple = self.trunk.row_multiple if self.trunk.packed else 1
        return plant(trees, packed=self.trunk.packed, multiple=multiple).to(self.trunk.device)
