"""The step `mix`: how often each row is written, so that the sources have the shares that the recipe wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from align.data.formats.rows import Row
from align.data.preparing.step import Decision, Item, Sketch, Sketches, Verdict, keep
from align.data.proportions import amounts, tempered, times
from align.recipe.errors import UserError
from align.recipe.preparing.mixing import Mix


class Mixing:
    """Rows by their sources."""

    name, where, raw = "mix", "workers", False

    def __init__(self, section: Mix, sources: Sequence[str], count: Callable[[Row], int], seed: int) -> None:
        """`sources`: their names, in the recipe's order; `count`: tokens of a row. Raises UserError for lists of
        another length."""
        for key in ("weights", "epochs", "caps"):
            given = getattr(section, key)
            if isinstance(given, list) and len(given) != len(sources):
                raise UserError(f"mix.{key}: expected one for each of the {len(sources)} sources, found {len(given)}")
        self.section, self.sources, self.count, self.seed = section, list(sources), count, seed

    def sketch(self, items: Sequence[Item]) -> Sketch:
        """`tokens`: (n,) int64."""
        return {"tokens": np.array([self.count(item.row) for item in items], np.int64)}

    def decide(self, sketches: Sketches, alive: np.ndarray, group: np.ndarray) -> Decision:
        """See SetStep. The counts say, for each source, what was wanted and what it came to."""
        section, n = self.section, len(self.sources)
        tokens, source = np.asarray(sketches["tokens"]), np.asarray(sketches.source)
        unit = tokens if section.by == "tokens" else np.ones_like(tokens)
        places = [np.flatnonzero(alive & (source == i)) for i in range(n)]
        sizes = np.array([unit[rows].sum() for rows in places], np.float64)
        weights = sizes if section.weights is None else np.where(sizes > 0, section.weights, 0.0)
        if not weights.any():
            raise UserError("mix: no row is left of the sources that have a weight")
        shares = tempered(weights, section.temperature)
        limits = sizes * section.epochs
        caps = [np.inf if cap is None else cap for cap in section.caps or [None] * n]
        taken = amounts(shares, np.minimum(limits, caps), section.total)
        often = np.zeros(len(tokens), np.int32)
        for i, rows in enumerate(places):
            often[rows] = times(unit[rows], float(taken[i]), np.random.default_rng([self.seed, 5, i]))
        counts = {"by": section.by, "sources": self._told(shares, taken, places, often, tokens)}
        return Decision(times=often, counts=counts)

    def edit(self, item: Item, cuts: np.ndarray) -> Verdict:
        """Rows stay as they are."""
        return keep(item)

    def _told(
        self, shares: np.ndarray, taken: np.ndarray, places: list[np.ndarray], often: np.ndarray, tokens: np.ndarray
    ) -> list[dict[str, str | int | float]]:
        """Of each source: the share that is wanted, and of what is written, rows, tokens, shares and passes."""
        rows = np.array([often[each].sum() for each in places], np.int64)
        seen = np.array([(often[each] * tokens[each]).sum() for each in places], np.int64)
        there = np.array([tokens[each].sum() for each in places], np.int64)
        return [
            {
                "source": self.sources[i],
                "wanted": round(float(shares[i]), 6),
                "amount": round(float(taken[i]), 3),
                "rows": int(rows[i]),
                "tokens": int(seen[i]),
                "share_of_rows": round(float(rows[i] / max(rows.sum(), 1)), 6),
                "share_of_tokens": round(float(seen[i] / max(seen.sum(), 1)), 6),
                "passes": round(float(seen[i] / max(there[i], 1)), 6),
            }
            for i in range(len(self.sources))
        ]
