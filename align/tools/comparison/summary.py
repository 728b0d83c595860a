"""A comparison in plain words: the four questions of a reader, and what else the figures show."""

from __future__ import annotations

import math
from collections.abc import Iterator

from align.tools.comparison.figures import ALIKE, Comparison
from align.tools.comparison.standings import in_lines, standings
from align.tools.comparison.verdict import Verdict, duel_words, verdicts, winner
from align.tools.comparison.words import KLS, number, ranged
from align.training.report.plots import amount, duration, size

FEW_PROMPTS = 30
QUESTIONS = ("Which won?", "At which KL?", "How surely?", "At what cost?")


def headlines(c: Comparison) -> list[str]:
    """What won, in a few words."""
    return [verdict.headline for verdict in verdicts(c)]


def answers(c: Comparison) -> list[tuple[str, list[str], str]]:
    """Question, answers, and what the words in them mean."""
    explained = (
        f"{c.score} is the score that decides: more is better. A run wins where its answer to a prompt has the higher "
        "score; a tie counts one half.",
        "KL tells how far a run's answers have moved from those of the reference model: 0 is not at all. It is counted "
        f"in nats an answer; two KLs are alike within {100 * ALIKE:.0f} %.",
        f"Ranges in brackets are 95 % intervals over {c.prompts} prompts; 50 % is an even match. They speak of other "
        "prompts like these, not of training again.",
        "Device time is time × devices, of training these runs alone: what they stand on, such as SFT or a reward "
        "model, is not counted.",
    )
    return list(zip(QUESTIONS, [*_told(verdicts(c)), [cost(c)]], explained, strict=True))


def _told(found: list[Verdict]) -> list[list[str]]:
    """Who won, at which KL, how surely; of several verdicts, each with its names."""
    lead = [f"{verdict.of}: " if len(found) > 1 else "" for verdict in found]
    columns = zip(*((verdict.won, verdict.kl, verdict.sure) for verdict in found), strict=True)
    return [[name + line for name, line in zip(lead, lines, strict=True)] for lines in columns]


def details(c: Comparison) -> list[str]:
    """What else the figures show."""
    return [*(line for verdict in verdicts(c) for line in verdict.pairs), *_baseline(c), *_overoptimised(c)]


def summary(c: Comparison) -> list[str]:
    """All of it but the cost, which differs between equal runs."""
    return [*(line for answer in _told(verdicts(c)) for line in answer), *in_lines(standings(c)), *details(c)]


def cost(c: Comparison) -> str:
    """What training took, the cheapest first."""
    said = []
    for group, members in c.groups.items():
        costs = [c.runs[i].cost for i in members]
        seconds, memory = ([x for x in column if x is not None] for column in list(zip(*costs, strict=True))[:2])
        if len(seconds) < len(members):
            said.append((math.inf, f"{group} not recorded"))
            continue
        about = [f"{len(members)} runs"] if len(members) > 1 else []
        about += [f"up to {size(max(memory))} of memory"] if memory else []
        said.append((sum(seconds), f"{group} {duration(sum(seconds))}" + (f" ({', '.join(about)})" if about else "")))
    return f"Device time of training: {'; '.join(words for _, words in sorted(said))}."


def notes(c: Comparison) -> list[str]:
    """What a careful reader has to know: exclusions, doubts, and how it was counted."""
    n = sum(pair.p_holm is not None for pair in c.pairs)
    said = [
        f"{c.prompts} prompts, scored by {c.score}. Ranges in brackets are 95 % intervals (BCa bootstrap over prompts, "
        f"{c.draws.times} resamples, seed {c.draws.seed}). What is said of who wins is corrected for {amount(n)} "
        "comparisons (Holm).",
        f"KL is {KLS[c.kl]}; alike are two that differ by at most {100 * ALIKE:.0f} % of the larger.",
    ]
    if c.prompts < FEW_PROMPTS:
        said.append(f"With fewer than {FEW_PROMPTS} prompts the intervals are rough.")
    for run in c.runs:
        lost = [f"{count} of {run.samples} ({score})" for score, count in run.excluded.items() if count]
        if lost and any(score in (c.score, c.proxy) for score, count in run.excluded.items() if count):
            said.append(f"{run.name}: answers left out because a judge gave no score: {', '.join(lost)}.")
    said += _sampled_otherwise(c)
    if c.baseline is not None:
        kl = c.kl_of(c.baseline)
        if abs(kl.value) > 0.01 and not kl.low <= 0 <= kl.high:
            name = c.runs[c.baseline].name
            said.append(
                f"The baseline {name} is not the reference: its KL is {ranged(kl)} nats. Best-of-n counts from it."
            )
    return said


def _sampled_otherwise(c: Comparison) -> Iterator[str]:
    """Runs whose answers were drawn in another way than the first one's; how many, and the seed, do not matter."""
    first = c.runs[0]
    for run in c.runs[1:]:
        keys = sorted((first.sampling.keys() | run.sampling.keys()) - {"samples", "seed"})
        if apart := [key for key in keys if first.sampling.get(key) != run.sampling.get(key)]:
            ways = (", ".join(f"{key} {one.sampling.get(key)}" for key in apart) for one in (run, first))
            told = " and ".join(f"{one.name} with {way}" for one, way in zip((run, first), ways, strict=True))
            yield f"The answers were not drawn alike: {told}. What is compared is then more than training."


def _baseline(c: Comparison) -> Iterator[str]:
    if c.baseline is None or len(c.runs) == 2 or len(c.groups) > 2:  # of which the verdict, or the table, tells
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
