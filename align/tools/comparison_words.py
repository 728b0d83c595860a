"""A comparison in plain words that claim no more than its intervals allow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

from align.tools.comparison import ALIKE, Comparison, Pair, at_like_kl
from align.tools.statistics import Estimate
from align.training.plots import amount, duration, percent

FEW_PROMPTS = 30
MOST_PAIRS = 6  # told one by one
KLS = {"full": "over the full vocabulary", "sequence": "the sequence estimate"}


def number(x: float) -> str:
    """Three digits, or all of an integer's, with a true minus sign; a dash where it is not known."""
    if not math.isfinite(x):
        return "–"
    return (f"{x:.3g}" if abs(x) < 999.5 else f"{x:,.0f}").replace("-", "−")


def ranged(e: Estimate) -> str:
    """1.2 (1.1 to 1.3)."""
    return f"{number(e.value)} ({number(e.low)} to {number(e.high)})" if math.isfinite(e.low) else number(e.value)


def rate(e: Estimate) -> str:
    """62.0 % (55.1 to 69.2)."""
    if not math.isfinite(e.value):
        return "–"
    return percent(e.value) + (f" ({100 * e.low:.1f} to {100 * e.high:.1f})" if math.isfinite(e.low) else "")


def winner(pair: Pair) -> int | None:
    """The run that is shown to win."""
    if not pair.sure:
        return None
    return pair.a if pair.win_rate.value > 0.5 else pair.b


def duel_words(c: Comparison, i: int, j: int) -> str:
    """Two runs head to head, the winner first."""
    pair = c.pair(i, j)
    a, b, won, even = pair.a, pair.b, pair.win_rate, pair.win_rate_equal_length
    if won.value < 0.5:
        a, b, won, even = b, a, won.turned, even.turned
    first, second = c.runs[a].name, c.runs[b].name
    if not math.isfinite(won.low):
        return f"{first} against {second}: too few prompts to tell."
    at = f"at KL {number(c.kl_of(a).value)} against {number(c.kl_of(b).value)} nats"
    often = f"{percent(won.value)} of the time ({100 * won.low:.1f} to {100 * won.high:.1f})"
    if not pair.sure:
        corrected = not won.low <= 0.5 <= won.high
        doubt = (
            "corrected for the number of comparisons, the difference may be" if corrected else "the difference may be"
        )
        return f"{first} wins {often} against {second}, {at}; {doubt} chance."
    alone = "" if pair.p_holm is not None else " (not corrected for the number of comparisons)"
    said = f"{first} beats {second}: it wins {often}, {at}{alone}."
    if not math.isfinite(even.low):
        return f"{said} What it wins at equal length cannot be told: their answers are never alike in length."
    if even.low <= 0.5:
        return f"{said} At equal length it is {rate(even)}: length may account for it."
    return said


def _alone(c: Comparison, i: int, j: int) -> tuple[str, list[str]]:
    """Two runs that nothing else is asked of."""
    first, names = winner(c.pair(i, j)), (c.runs[i].name, c.runs[j].name)
    if first is None:
        return f"{names[0]} or {names[1]}: not decided", [duel_words(c, i, j)]
    elsewhere = "" if at_like_kl(c, i, j) else ", at another KL"
    return f"{c.runs[first].name} wins{elsewhere}", [duel_words(c, i, j)]


def verdict(c: Comparison, g: str, h: str) -> tuple[str, list[str]]:
    """Two groups: a headline, and the sentences that it stands on."""
    members = c.groups
    if len(members[g]) == len(members[h]) == 1:
        return _alone(c, members[g][0], members[h][0])
    like = [pair for pair in c.pairs if pair.alike and {c.runs[pair.a].group, c.runs[pair.b].group} == {g, h}]
    like.sort(key=lambda pair: c.kl_of(pair.a).value + c.kl_of(pair.b).value)
    wins = {k: [p for p in like if (w := winner(p)) is not None and c.runs[w].group == k] for k in (g, h)}
    ahead = [k for k in (g, h) if wins[k]]
    if not like:
        short = f"{g} or {h}: no runs at like KL"
        spans = [f"{k}: {_span(c, k)} nats" for k in (g, h)]
        long = (
            f"No run of {g} lies at like KL to one of {h} ({'; '.join(spans)}), so no winner at equal KL can be named."
        )
    elif len(ahead) == 1:
        short = f"{ahead[0]} wins at like KL"
        long = (
            f"At like KL {ahead[0]} wins {len(wins[ahead[0]])} of {_pairs(len(like))}{_at(c, wins[ahead[0]])}; "
            f"{_rest(len(like) - len(wins[ahead[0]]))}."
        )
    elif ahead:
        short = f"{g} or {h}: it depends on the KL"
        long = f"At like KL {g} wins {len(wins[g])} of {_pairs(len(like))}{_at(c, wins[g])}; "
        long += f"{h} wins {len(wins[h])}{_at(c, wins[h])}."
    else:
        short = f"{g} or {h}: not decided"
        long = f"At like KL neither {g} nor {h} is shown to win: {_pairs(len(like))}, none decided."
    said = [long, *(duel_words(c, pair.a, pair.b) for pair in like[:MOST_PAIRS])]
    best = c.best(g), c.best(h)
    flattered = "They were chosen by these same scores, which flatters them."
    return short, [*said, f"The highest mean score of each: {duel_words(c, *best)} {flattered}"]


def verdicts(c: Comparison) -> list[tuple[str, list[str]]]:
    """Of every two groups, or of the two runs of the only one."""
    groups = list(c.groups)
    if len(groups) == 1 and len(c.groups[groups[0]]) == 2:
        return [_alone(c, *c.groups[groups[0]])]
    return [verdict(c, g, h) for g, h in combinations(groups, 2)]


def headlines(c: Comparison) -> list[str]:
    """What won, in a few words."""
    if told := [short for short, _ in verdicts(c)]:
        return told
    (group, members), *_ = c.groups.items()
    if c.baseline is None:
        return [f"{group}: {len(members)} runs beside each other"]
    wins = sum(winner(c.pair(i, c.baseline)) == i for i in members)
    return [f"{group}: {wins} of {len(members)} runs beat{'s' if len(members) == 1 else ''} the baseline"]


def summary(c: Comparison) -> list[str]:
    """The paragraphs under the headline."""
    return [*(line for _, lines in verdicts(c) for line in lines), *_baseline(c), *_overoptimised(c), *_cost(c)]


def notes(c: Comparison) -> list[str]:
    """What a careful reader has to know: exclusions, doubts, and how it was counted."""
    n = sum(pair.p_holm is not None for pair in c.pairs)
    said = [
        f"{c.prompts} prompts, scored by {c.score}. Ranges in brackets are 95 % intervals (BCa bootstrap over prompts, "
        f"{c.draws.times} resamples, seed {c.draws.seed}). What is said of who wins is corrected for {amount(n)} "
        "comparisons (Holm).",
        f"KL is {KLS[c.kl]}. Like KL: within {100 * ALIKE:.0f} % of the larger.",
    ]
    if c.prompts < FEW_PROMPTS:
        said.append(f"With fewer than {FEW_PROMPTS} prompts the intervals are rough.")
    for run in c.runs:
        lost = [f"{count} of {run.samples} ({score})" for score, count in run.excluded.items() if count]
        if lost and any(score in (c.score, c.proxy) for score, count in run.excluded.items() if count):
            said.append(f"{run.name}: answers left out because a judge gave no score: {', '.join(lost)}.")
    if c.baseline is not None:
        kl = c.kl_of(c.baseline)
        if abs(kl.value) > 0.01 and not kl.low <= 0 <= kl.high:
            name = c.runs[c.baseline].name
            said.append(
                f"The baseline {name} is not the reference: its KL is {ranged(kl)} nats. Best-of-n counts from it."
            )
    return said


def _baseline(c: Comparison) -> Iterator[str]:
    if c.baseline is None:
        return
    for group, members in c.groups.items():
        if len(members) == 1:
            yield duel_words(c, members[0], c.baseline)
            continue
        who = [winner(c.pair(i, c.baseline)) for i in members]
        won, lost = sum(w in members for w in who), who.count(c.baseline)
        yield (
            f"Of {len(members)} runs of {group}, {won} beat the baseline, {lost} lose to it, "
            f"{len(members) - won - lost} are not decided."
        )


def _overoptimised(c: Comparison) -> Iterator[str]:
    """Where the proxy goes on rising while the score falls."""
    if c.proxy is None:
        return
    for group, members in c.groups.items():
        top, best = max(members, key=lambda i: c.runs[i].scores[c.proxy].value), c.best(group)
        if top == best or c.kl_of(top).value <= c.kl_of(best).value:
            continue
        apart = c.pair(best, top).score_difference
        low, high = (apart.low, apart.high) if best < top else (-apart.high, -apart.low)
        if low > 0:
            yield (
                f"Over-optimisation in {group}: from {c.runs[best].name} (KL {number(c.kl_of(best).value)}) to "
                f"{c.runs[top].name} (KL {number(c.kl_of(top).value)}) {c.proxy} rises, but {c.score} falls by "
                f"{number(abs(apart.value))} ({number(low)} to {number(high)}; the two were chosen by these scores)."
            )


def _cost(c: Comparison) -> Iterator[str]:
    """The cheapest first."""
    said = []
    for group, members in c.groups.items():
        seconds = [c.runs[i].device_seconds for i in members]
        known = [s for s in seconds if s is not None]
        total, runs = sum(known), f"{len(members)} runs" if len(members) > 1 else "1 run"
        if len(known) == len(members):
            said.append((total, f"{group} {duration(total)} ({runs})"))
        else:
            said.append((math.inf, f"{group} not recorded"))
    yield f"Device time of training: {', '.join(words for _, words in sorted(said))}."


def _span(c: Comparison, group: str) -> str:
    kls = [c.kl_of(i).value for i in c.groups[group]]
    return number(kls[0]) if len(kls) == 1 else f"{number(min(kls))} to {number(max(kls))}"


def _at(c: Comparison, pairs: list[Pair]) -> str:
    kls = sorted((c.kl_of(pair.a).value + c.kl_of(pair.b).value) / 2 for pair in pairs)
    return f" (at KL {', '.join(map(number, kls))} nats)" if kls else ""


def _pairs(n: int) -> str:
    return f"{n} pairs of runs" if n != 1 else "1 pair of runs"


def _rest(n: int) -> str:
    return f"{n} {'is' if n == 1 else 'are'} not decided" if n else "none is left undecided"
