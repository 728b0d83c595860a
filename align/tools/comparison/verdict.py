"""Which of two runs or groups won, at which KL, how surely: in plain words that claim no more than intervals allow."""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

from align.tools.comparison.figures import SURE, Comparison, Pair, at_like_kl
from align.tools.comparison.words import number, ranged, rate
from align.training.bootstrap import Estimate
from align.training.report.plots import percent

MOST_PAIRS = 6  # told one by one
NO_ONE = "No winner is named among more than two runs of one group."


class Verdict(NamedTuple):
    """Of two runs, or of two groups of them."""

    of: str
    headline: str
    won: str
    kl: str
    sure: str
    pairs: list[str]  # what it stands on, a sentence each


def verdicts(c: Comparison) -> list[Verdict]:
    """Of two groups, or of more, all at once; of the two runs of the only one, or of its only run and the baseline."""
    groups = c.groups
    if len(groups) > 2:
        return [_of_many(c)]
    if len(groups) == 2:
        return [_of_groups(c, *groups)]
    ((group, members),) = groups.items()
    two = [*members, *([] if c.baseline is None else [c.baseline])]
    if len(members) == 2 or len(two) == 2:
        return [_of_two(c, *two[:2])]
    kl = f"Their KLs are {_span(c, group)} nats."
    if c.baseline is None:
        return [Verdict(group, f"{group}: {len(members)} runs beside each other", NO_ONE, kl, "–", [])]
    wins = [p for i in members if winner(p := c.pair(i, c.baseline)) == i]
    headline = f"{group}: {len(wins)} of {len(members)} runs beat the baseline"
    return [Verdict(group, headline, f"{headline}.", kl, _shown(c, wins), [])]


def winner(pair: Pair) -> int | None:
    """The run that is shown to win."""
    if not pair.sure:
        return None
    return pair.a if pair.win_rate.value > 0.5 else pair.b


def duel_words(c: Comparison, i: int, j: int) -> str:
    """Two runs head to head in one sentence, the one ahead first."""
    pair = c.pair(i, j)
    a, b, won, even = _ahead(c, pair)
    first, second = c.runs[a].name, c.runs[b].name
    if not math.isfinite(won.low):
        return f"{first} against {second}: too few prompts to tell."
    at = f"at KL {number(c.kl_of(a).value)} against {number(c.kl_of(b).value)} nats"
    if not pair.sure:
        return f"{first} wins {_often(won)} against {second}, {at}; {_doubt(won)} chance."
    alone = "" if pair.p_holm is not None else " (not corrected for the number of comparisons)"
    return " ".join([f"{first} beats {second}: it wins {_often(won)}, {at}{alone}.", *_length(even)])


# ------------------------------------------------------------------------------------------------- two runs


def _of_two(c: Comparison, i: int, j: int) -> Verdict:
    """Two runs that nothing else is asked of."""
    pair = c.pair(i, j)
    a, b, won, even = _ahead(c, pair)
    first, second = c.runs[a].name, c.runs[b].name
    both, kl, farther = f"{first} and {second}", _distance(c, a, b), _farther(c, a, b)
    if not math.isfinite(won.low):
        few = "There are too few prompts to tell."
        return Verdict(both, f"{first} or {second}: not decided", few, kl, "Not at all.", [])
    wins = f"{first} wins {_often(won)} against {second}"
    if not pair.sure:
        sure = (
            f"Not surely: {'50 % lies within the interval' if won.low <= 0.5 <= won.high else _doubt(won) + ' chance'}."
        )
        return Verdict(both, f"{first} or {second}: not decided", f"Neither is shown to win. {wins}.", kl, sure, [])
    if c.baseline in (a, b):
        how = ""
    elif at_like_kl(c, a, b):
        how = " at like KL"
    else:
        how = {a: ", but has moved farther", b: ", and has moved less", None: ", at another KL"}[farther]
    headline = f"{first} beats {second}{how}"
    return Verdict(
        both, headline, f"{first}. It wins {_often(won)} against {second}.", kl, _surely(c, [pair], even), []
    )


def _distance(c: Comparison, i: int, j: int) -> str:
    """How far two runs are from the reference, and whether that is a fair match."""
    names, kls = [c.runs[k].name for k in (i, j)], [ranged(c.kl_of(k)) for k in (i, j)]
    said = f"{names[0]} at KL {kls[0]} nats, {names[1]} at {kls[1]}"
    if c.baseline in (i, j):
        return f"{said}."
    if at_like_kl(c, i, j):
        return f"{said}: alike, so the match is fair."
    farther = _farther(c, i, j)
    what = "not alike" if farther is None else f"{c.runs[farther].name} has moved farther"
    return f"{said}: {what}, so this does not tell which is better at equal KL."


def _farther(c: Comparison, i: int, j: int) -> int | None:
    """The one that is shown to lie farther from the reference."""
    here, there = c.kl_of(i), c.kl_of(j)
    return i if here.low > there.high else j if there.low > here.high else None


# ------------------------------------------------------------------------------------------------- two groups


def _of_groups(c: Comparison, g: str, h: str) -> Verdict:
    members, both = c.groups, f"{g} and {h}"
    if len(members[g]) == len(members[h]) == 1:
        return _of_two(c, members[g][0], members[h][0])
    like = like_pairs(c, g, h)
    best = duel_words(c, c.best(g), c.best(h))
    highest = f"The highest mean score of each: {best} They were chosen by these same scores, which flatters them."
    details = [*(duel_words(c, pair.a, pair.b) for pair in like[:MOST_PAIRS]), highest]
    if not like:
        spans = "; ".join(f"{k}: {_span(c, k)} nats" for k in (g, h))
        kl = f"No run of {g} lies at like KL to one of {h} ({spans})."
        won, sure = "No winner at equal KL can be named.", "Nothing is shown of runs at like KL."
        return Verdict(both, f"{g} or {h}: no runs at like KL", won, kl, sure, details)
    wins = {k: [p for p in like if (w := winner(p)) is not None and c.runs[w].group == k] for k in (g, h)}
    ahead = [k for k in (g, h) if wins[k]]
    left = len(like) - sum(map(len, wins.values()))
    if ahead:
        beaten = h if ahead[0] == g else g
        short = f"{ahead[0]} beats {beaten} at like KL" if len(ahead) == 1 else f"{g} or {h}: it depends on the KL"
        counts = [f"{k} wins {len(wins[k])}" for k in ahead]
        counts[0] += f" of {_pairs(len(like))}"
        won = f"At like KL {'; '.join(counts)}; {_rest(left)}."
        kl = " ".join(f"{k} wins at KL {_at(c, wins[k])} nats." for k in ahead)
        return Verdict(both, short, won, kl, _shown(c, [p for k in ahead for p in wins[k]]), details)
    won = f"At like KL neither {g} nor {h} is shown to win: {_pairs(len(like))}, none decided."
    kl = f"They were compared at KL {_at(c, like)} nats."
    return Verdict(both, f"{g} or {h}: not decided", won, kl, "Not surely: any difference may be chance.", details)


def like_pairs(c: Comparison, g: str, h: str) -> list[Pair]:
    """Runs of two groups at like KL, the nearest to the reference first."""
    like = [pair for pair in c.pairs if pair.alike and {c.runs[pair.a].group, c.runs[pair.b].group} == {g, h}]
    return sorted(like, key=lambda pair: c.kl_of(pair.a).value + c.kl_of(pair.b).value)


# ------------------------------------------------------------------------------------------- three groups and more


def _of_many(c: Comparison) -> Verdict:
    """Whether one of the groups wins against each other at like KL; `standings` has them side by side."""
    groups, wins = [*c.groups], dict[str, list[Pair]]()
    beaten: dict[str, set[str]] = {g: set() for g in groups}
    pairs = []
    for g, h in combinations(groups, 2):
        pairs += (like := like_pairs(c, g, h))
        who = {k: [pair for pair in like if (w := winner(pair)) is not None and c.runs[w].group == k] for k in (g, h)}
        for k, other in ((g, h), (h, g)):
            wins.setdefault(k, []).extend(who[k])
            if who[k] and not who[other]:
                beaten[k].add(other)
    every = f"{', '.join(groups[:-1])} and {groups[-1]}"
    shown = [pair for own in wins.values() for pair in own]
    kls = sorted((c.kl_of(pair.a).value + c.kl_of(pair.b).value) / 2 for pair in pairs)
    span = " to ".join(dict.fromkeys(map(number, kls[:: max(len(kls) - 1, 1)])))
    kl = f"They were compared at KL {span} nats." if pairs else "No two runs of two groups lie at like KL."
    first = next((g for g in groups if len(beaten[g]) == len(groups) - 1), None)
    if first is None:
        short, won = f"{every}: none beats all others", "No group is shown to win against each other at like KL."
        return Verdict(every, short, won, kl, _shown(c, shown), [])
    won = f"{first}. At like KL it wins against each other group, and loses to none."
    return Verdict(every, f"{first} beats all others at like KL", won, kl, _shown(c, wins[first]), [])


def _shown(c: Comparison, wins: list[Pair]) -> str:
    """The wins with their intervals."""
    if not wins:
        return "Nothing is shown: any difference may be chance."
    told = []
    for pair in wins[:MOST_PAIRS]:
        a, b, won, _ = _ahead(c, pair)
        told.append(f"{c.runs[a].name} wins {_often(won)} against {c.runs[b].name}")
    more = [f"and {len(wins) - MOST_PAIRS} more"] * (len(wins) > MOST_PAIRS)
    return f"{'; '.join([*told, *more])}. {_surely(c, wins)}"


# ------------------------------------------------------------------------------------------------- phrases


def _ahead(c: Comparison, pair: Pair) -> tuple[int, int, Estimate, Estimate]:
    """The run that wins more often (by name where both win as often), the other, its win rate, that at equal length."""
    a, b, won, even = pair.a, pair.b, pair.win_rate, pair.win_rate_equal_length
    turned = won.value < 0.5 or (won.value == 0.5 and c.runs[b].name < c.runs[a].name)
    return (b, a, won.turned, even.turned) if turned else (a, b, won, even)


def _often(won: Estimate) -> str:
    return f"{percent(won.value)} of the time ({100 * won.low:.1f} to {100 * won.high:.1f})"


def _doubt(won: Estimate) -> str:
    corrected = "" if won.low <= 0.5 <= won.high else "corrected for the number of comparisons, "
    return f"{corrected}the difference may be"


def _surely(c: Comparison, wins: list[Pair], even: Estimate | None = None) -> str:
    """What stands behind wins that are shown, and whether length may be why."""
    n = sum(pair.p_holm is not None for pair in c.pairs)
    corrected = f", corrected for {n} comparisons" if n > 1 and all(pair.p_holm is not None for pair in wins) else ""
    which = "The interval lies" if len(wins) == 1 else "All these intervals lie"
    said = f"{which} above 50 %; chance alone would do this less than once in {1 / SURE:.0f} times{corrected}."
    return " ".join([said, *(_length(even) if even else [])])


def _length(even: Estimate) -> list[str]:
    """The doubt that the longer answer won because it was longer."""
    if not math.isfinite(even.low):
        return ["What it wins at equal length cannot be told: their answers are never alike in length."]
    return [f"At equal length it is {rate(even)}: length may account for it."] if even.low <= 0.5 else []


def _span(c: Comparison, group: str) -> str:
    kls = [c.kl_of(i).value for i in c.groups[group]]
    return number(kls[0]) if len(kls) == 1 else f"{number(min(kls))} to {number(max(kls))}"


def _at(c: Comparison, pairs: list[Pair]) -> str:
    kls = sorted((c.kl_of(pair.a).value + c.kl_of(pair.b).value) / 2 for pair in pairs)
    return " and ".join([*([", ".join(map(number, kls[:-1]))] if kls[1:] else []), number(kls[-1])])


def _pairs(n: int) -> str:
    return f"{n} pairs of runs" if n != 1 else "1 pair of runs"


def _rest(n: int) -> str:
    return f"{n} {'is' if n == 1 else 'are'} not decided" if n else "none is left undecided"
