"""Three groups of runs and more, beside each other: a row each."""

from __future__ import annotations

from align.tools.comparison.figures import Comparison, Pair, at_like_kl
from align.tools.comparison.verdict import like_pairs, winner
from align.tools.comparison.words import number, ranged, rate


def standings(c: Comparison) -> list[list[str]]:
    """The head, then each group: its highest mean score, the KL there, what it wins of the baseline, and what of each
    other group at like KL. Nothing for fewer than three groups."""
    groups = c.groups
    if len(groups) < 3:
        return []
    against = ["Against the baseline"] * (c.baseline is not None)
    table = [["Group", f"Highest mean {c.score}", "KL there", *against, *(f"Against {h}" for h in groups)]]
    for g in groups:
        best = c.best(g)
        row = [g, ranged(c.score_of(best)), number(c.kl_of(best).value)]
        row += [_beside_baseline(c, g)] if against else []
        table.append(row + ["–" if g == h else _beside(c, g, h) for h in groups])
    return table


def in_lines(table: list[list[str]]) -> list[str]:
    """The same as a line a group."""
    lines = []
    for group, *cells in table[1:]:
        told = [f"{name[0].lower()}{name[1:]} {cell}" for name, cell in zip(table[0][1:], cells, strict=True)]
        lines.append(f"{group}: {'; '.join(text for text, cell in zip(told, cells, strict=True) if cell != '–')}.")
    return lines


def _beside(c: Comparison, g: str, h: str) -> str:
    """What a group wins of another at like KL."""
    like = like_pairs(c, g, h)
    if len(c.groups[g]) == len(c.groups[h]) == 1:
        i, j = c.groups[g][0], c.groups[h][0]
        return _one(c, i, j) + ("" if at_like_kl(c, i, j) else ", at another KL")
    return _counted(c, g, like) if like else "no runs at like KL"


def _beside_baseline(c: Comparison, g: str) -> str:
    members = c.groups[g]
    return (
        _one(c, members[0], c.baseline)
        if len(members) == 1
        else _counted(c, g, [c.pair(i, c.baseline) for i in members])
    )


def _one(c: Comparison, i: int, j: int) -> str:
    """Run i beside run j."""
    pair = c.pair(i, j)
    word = {i: "wins", j: "loses", None: "not decided:"}[winner(pair)]
    return f"{word} {rate(pair.win_rate if pair.a == i else pair.win_rate.turned)}"


def _counted(c: Comparison, g: str, pairs: list[Pair]) -> str:
    """Of pairs of runs, how many the group wins."""
    who = [w if (w := winner(pair)) is None else c.runs[w].group == g and not c.runs[w].baseline for pair in pairs]
    kinds = {"won": who.count(True), "lost": who.count(False), "not decided": who.count(None)}
    told = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    return f"{told} of {len(pairs)}" if len(pairs) > 1 else told.removeprefix("1 ")
