"""Known failures of PPO and GRPO, told from a run's metrics, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

RECENT = 5  # records that a judgement on a course rests on
NEEDED = ("ended", "response_tokens", "score")


class Finding(NamedTuple):
    """Something that a user should look into."""

    kind: str
    text: str


Course = Sequence[dict[str, Any]]  # records of one split in their order, the first and the last ones at least


def diagnose(train: Course, held: Course, judges: Sequence[str] = ()) -> list[Finding]:
    """What the lines of metrics.jsonl show, train and eval; `judges`: parts of the reward with weight 0.

    A record in which a number is not known is passed over.
    """
    train, held = (_known(course, *NEEDED) for course in (train, held))
    found = []
    if len(train) >= RECENT:
        found += [*_negative_kl(train), *_no_end(train), *_blind_critic(train), *_equal_groups(train), *_idle(train)]
        found += _another_actor(train)
    for course in (held, train):
        if len(course) > 1:
            found += [*_lengths(course), *_entropy(course)]
    found += [finding for judge in judges for finding in _hacking(held, f"score/{judge}", judge)]
    return list({finding.kind: finding for finding in found}.values())


def _negative_kl(train: Course) -> list[Finding]:
    told = _known(train, "kl_per_token")  # which is not, where no step asks the reference
    if len(told) < RECENT or (kl := _mean(told, "kl_per_token")) > -0.01:
        return []
    return [
        Finding(
            "negative KL",
            f"the KL estimate is negative ({kl:.3f} nats a token): responses do not come from the distribution that "
            "scores them, and the penalty pays for going astray. Sample without top_k, top_p, min_p and "
            "repetition_penalty, or (PPO) take kl_estimator=k3",
        )
    ]


def _no_end(train: Course) -> list[Finding]:
    ended = _mean(train, "ended")
    if ended >= 0.1:
        return []
    return [
        Finding(
            "no end",
            f"{ended:.0%} of responses come to an end: the reward judges fragments. Raise generation.max_new, or set "
            "missing_eos_penalty",
        )
    ]


def _blind_critic(train: Course) -> list[Finding]:
    told = _known(train, "explained_variance")  # which is not, where returns did not vary
    if len(told) < 4 * RECENT or (known := _mean(told, "explained_variance")) >= 0:
        return []
    return [
        Finding(
            "blind critic",
            f"the critic explains nothing of the returns (explained variance {known:.2f}): raise "
            "critic_learning_rate, or give it a critic_warmup",
        )
    ]


def _equal_groups(train: Course) -> list[Finding]:
    told = _known(train, "equal_groups")
    if len(told) < 4 * RECENT or (share := _mean(told, "equal_groups")) < 0.9:
        return []
    return [
        Finding(
            "equal groups",
            f"{share:.0%} of groups have equal scores, which say nothing of better and worse: take more samples, "
            "prompts that are neither too easy nor too hard, or a reward with more than two values",
        )
    ]


def _idle(train: Course) -> list[Finding]:
    if any(record.get("updates") != 0 for record in train[-RECENT:]):
        return []
    return [
        Finding(
            "nothing learnt",
            f"{RECENT} steps in a row learnt nothing: their groups have equal scores and are dropped, or their "
            "responses do not end and are masked. Look at the responses and their scores, take more samples or raise "
            "generation.max_new",
        )
    ]


def _another_actor(train: Course) -> list[Finding]:
    told = _known(train, "mismatch_kl")  # which is only of responses that a server draws
    if len(told) < RECENT:
        return []
    # At first the actor is the base, so that the two engines differ by rounding alone.
    first, last = told[0]["mismatch_kl"], _mean(told, "mismatch_kl")
    if last < max(0.01, 10 * first):
        return []
    return [
        Finding(
            "another actor",
            f"the server has come away from the actor: mismatch_kl rose from {first:.2g} to {last:.2g} nats a token. "
            "See in its log whether it loads the adapter in each step; if it does, give both engines one precision",
        )
    ]


def _lengths(course: Course) -> list[Finding]:
    first, last = course[0]["response_tokens"], course[-1]["response_tokens"]
    if abs(last - first) < 8 or 0.5 < last / first < 1.5:
        return []
    return [
        Finding(
            "length drift",
            f"responses went from {first:.0f} to {last:.0f} tokens: the reward may pay for length alone. Look at "
            "score against length, or set length_penalty",
        )
    ]


def _entropy(course: Course) -> list[Finding]:
    if len(course := _known(course, "entropy")) < 2:  # a step that learns nothing does not ask for it
        return []
    first, last = course[0]["entropy"], course[-1]["entropy"]
    if last > 0.25 * first or last > 0.5:
        return []
    return [
        Finding(
            "collapsed entropy",
            f"the actor's entropy fell from {first:.2f} to {last:.2f} nats a token: it says nearly one thing. Raise "
            "kl_coef or entropy_coef, or lower optim.learning_rate",
        )
    ]


def _hacking(held: Course, judge: str, name: str) -> list[Finding]:
    if len(held := _known(held, judge)) < 2:
        return []
    score, word = (held[-1][key] - held[0][key] for key in ("score", judge))
    if score <= 0 or word > 0:
        return []
    return [
        Finding(
            f"reward hacking, {name}",
            f"the held-out score rose by {score:.2f}, but the judge {name} did not ({word:+.2f}): the actor may be "
            "gaming the reward. Read the responses, and take the best checkpoint within a lower kl_budget",
        )
    ]


def _known(records: Course, *names: str) -> Course:
    return [record for record in records if all(record.get(name) is not None for name in names)]


def _mean(records: Course, name: str) -> float:
    return sum(record[name] for record in records[-RECENT:]) / len(records[-RECENT:])
