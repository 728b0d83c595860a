"""Each known failure is told of records that show it, and of none that are healthy."""

from __future__ import annotations

import pytest

from align.training.rollouts.diagnosis import Finding, diagnose

HEALTHY = {
    "kl_per_token": 0.02,
    "ended": 0.9,
    "explained_variance": 0.3,
    "response_tokens": 30.0,
    "entropy": 2.0,
    "score": 0.5,
    "score/judge": 1.0,
}


def course(split: str, count: int, **changes) -> list[dict]:
    """Records of a run; a pair is gone through from its first to its second number, anything else holds throughout."""
    made = []
    for i in range(count):
        along = i / max(count - 1, 1)
        moved = {k: v[0] + along * (v[1] - v[0]) if isinstance(v, tuple) else v for k, v in changes.items()}
        made.append({"step": i, "split": split, **HEALTHY, **moved})
    return made


def told(records, judges=("judge",)) -> list[Finding]:
    train, held = ([record for record in records if record["split"] == split] for split in ("train", "eval"))
    return diagnose(train, held, judges)


def kinds(*records: dict, judges=("judge",)) -> set[str]:
    return {finding.kind for finding in told(records, judges)}


HACKED = {"score": (0.5, 1.5), "score/judge": (1.0, 0.8)}


@pytest.mark.parametrize(
    ("records", "kind", "words"),
    [
        (course("train", 5, kl_per_token=-0.05), "negative KL", "-0.050 nats a token"),
        (course("train", 5, ended=0.05), "no end", "5% of responses come to an end"),
        (course("train", 5, updates=0, entropy=None), "nothing learnt", "5 steps in a row learnt nothing"),
        (course("train", 20, explained_variance=-0.5), "blind critic", "explained variance -0.50"),
        (course("train", 20, mismatch_kl=(0.0, 0.1)), "another actor", "rose from 0 to 0.089 nats a token"),
        (course("train", 2, response_tokens=(30.0, 50.0)), "length drift", "from 30 to 50 tokens"),
        (course("eval", 3, response_tokens=(30.0, 12.0)), "length drift", "from 30 to 12 tokens"),
        (course("train", 4, entropy=(2.0, 0.1)), "collapsed entropy", "from 2.00 to 0.10 nats"),
        (course("eval", 2, **HACKED), "reward hacking, judge", "rose by 1.00, but the judge judge did not (-0.20)"),
    ],
)
def test_a_failure_is_told(records, kind, words):
    """That alone, in words with its numbers."""
    (finding,) = told(records)
    assert finding.kind == kind
    assert words in finding.text


@pytest.mark.parametrize(
    "records",
    [
        [],
        [*course("train", 30), *course("eval", 5)],
        course("train", 4, kl_per_token=-0.05, ended=0.0),  # too early to tell
        course("train", 19, explained_variance=-0.5),
        course("train", 5, kl_per_token=-0.005),  # as noise has it
        course("train", 20, mismatch_kl=0.02),  # of other kernels, from the first step on
        course("train", 20, mismatch_kl=(0.0, 0.008)),
        course("train", 5, response_tokens=(2.0, 6.0)),  # a few tokens
        course("train", 5, response_tokens=(30.0, 42.0)),
        course("train", 5, entropy=(4.0, 0.9)),  # a quarter of the first, but many words yet
        course("train", 5, entropy=(0.4, 0.3)),  # little, as at the start
        course("eval", 1, **HACKED),
        course("eval", 3, **{"score": (0.5, 1.5), "score/judge": (1.0, 1.1)}),
        course("eval", 3, **{"score": (0.5, 0.4), "score/judge": (1.0, 0.8)}),
        course("train", 3, **HACKED),  # of other prompts every time
    ],
)
def test_nothing_is_told_of_a_healthy_run(records):
    assert kinds(*records) == set()


def test_a_judgement_rests_on_the_last_records():
    """What mended itself is no failure; what has begun lately is."""
    mended = [*course("train", 5, ended=0.0), *course("train", 5)]
    assert kinds(*mended) == set()
    assert kinds(*reversed(mended)) == {"no end"}


def test_each_kind_is_told_once():
    """Though training and held-out prompts both show it; every judge has its own."""
    both = [*course("train", 2, entropy=(2.0, 0.1)), *course("eval", 2, entropy=(2.0, 0.1))]
    assert len(told(both)) == 1
    hacked = course("eval", 2, **HACKED, **{"score/other": (1.0, 0.0), "score/third": (0.0, 1.0)})
    judges = ("judge", "other", "third")
    assert kinds(*hacked, judges=judges) == {"reward hacking, judge", "reward hacking, other"}


def test_a_number_that_is_not_known_shows_nothing():
    """Such as the explained variance of returns that do not vary; the records beside it are judged as ever."""
    unknown = course("train", 20, explained_variance=None)
    assert kinds(*unknown) == set()
    assert kinds(*unknown, *course("train", 20, explained_variance=-0.5)) == {"blind critic"}
    assert kinds(*course("train", 1, kl_per_token=None), *course("train", 5, kl_per_token=-0.05)) == {"negative KL"}
    assert kinds(*course("eval", 3, **{"score": (0.5, 1.5), "score/judge": None})) == set()
