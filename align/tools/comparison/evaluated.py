"""What `align.evaluate` left of a run: its answers to the prompts, scored, read and checked for a comparison.

A folder holds `evaluation.json` (what was evaluated, and how) and `responses.jsonl` (an answer a line). A score that is
null is a judge that failed; it is counted and left out. Everything else that is not as it should be is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy import ndarray as Array
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.recipe.errors import UserError
from align.recipe.records import each_line, parsed

TOLD = 3  # problems of one file; the rest are counted
Count = Annotated[int, Field(ge=0, lt=2**53)]  # a float holds it exactly


class Training(BaseModel):
    """How the policy was trained, and what it cost."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    run: str | None = None
    stage: str
    settings: dict[str, Any] = Field(default_factory=dict)
    device_seconds: float | None = None
    peak_memory_bytes: Count | None = None
    tokens_sampled: Count | None = None


class About(BaseModel):
    """evaluation.json."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    stage: Literal["evaluate"]
    name: str = Field(min_length=1)
    policy: str
    fingerprint: str
    tokenizer: str
    prompts: str
    sampling: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, str] = Field(default_factory=dict)  # what each one is
    metrics: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    judges: dict[str, Any] = Field(default_factory=dict)
    training: Training | None = None


class Answer(BaseModel):
    """A line of responses.jsonl."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    prompt: Count
    sample: Count
    key: str
    prompt_text: str
    response: str
    tokens: Count
    ended: bool
    logprob: float
    ref_logprob: float
    kl: float | None = None
    scores: dict[str, float | None]


class Evaluated(NamedTuple):
    """A run's answers: n prompts, s samples each at most; nan where there is no such sample, or no such figure."""

    path: Path
    name: str
    group: str
    about: About
    keys: list[str]  # of the prompts
    prompts: list[str]
    responses: list[str]  # of each prompt, its first sample
    scores: dict[str, Array]  # each (n, s)
    lengths: Array  # (n, s), tokens
    ended: Array  # (n, s), 1 or 0
    log_ratio: Array  # (n, s), logprob - ref_logprob, nats
    kl: Array  # (n, s), over the full vocabulary, nats

    @property
    def samples(self) -> int:
        """How many answers there are."""
        return int(np.isfinite(self.lengths).sum())

    def first(self, score: str) -> Array:
        """(n,): the score of each prompt's first sample."""
        sample = np.isfinite(self.lengths).argmax(1)
        return self.scores[score][np.arange(len(sample)), sample]

    def excluded(self, score: str) -> int:
        """Answers without this score."""
        return self.samples - int(np.isfinite(self.scores[score]).sum())


def read_run(folder: Path, name: str | None, group: str | None) -> Evaluated:
    """Read and check one folder. Raises UserError with every problem, by file and line."""
    absent = [f for f in ("evaluation.json", "responses.jsonl") if not (folder / f).is_file()]
    if absent:
        what = "no such folder" if not folder.is_dir() else f"no {' and no '.join(absent)} in this folder"
        raise UserError(f"{folder}: {what}; name the run folder of a finished align.evaluate")
    about = _about(folder / "evaluation.json")
    answers = _answers(folder / "responses.jsonl")
    stage = about.training.stage if about.training else about.name
    return _arranged(folder, name or about.name, group or stage, about, answers)


def _about(path: Path) -> About:
    if (record := parsed(path.read_bytes())) is None:
        raise UserError(f"{path}: this is not whole JSON; run align.evaluate again")
    try:
        return About.model_validate(record)
    except ValidationError as error:
        raise UserError(*_limited(path, [f"{path}: {fault}" for fault in _faults(error)])) from None


def _answers(path: Path) -> list[Answer]:
    answers, problems = [], []
    seen: dict[tuple[int, int], int] = {}
    for number, record in each_line(path):
        if record is None:
            problems.append(f"{path}:{number}: this is not a line of JSON (cut off?); run align.evaluate again")
            continue
        try:
            answer = Answer.model_validate(record)
        except ValidationError as error:
            problems += [f"{path}:{number}: {fault}" for fault in _faults(error)]
            continue
        first = seen.setdefault((answer.prompt, answer.sample), number)
        if first != number:
            twice = f"prompt {answer.prompt}, sample {answer.sample} already stands on line {first}"
            problems.append(f"{path}:{number}: {twice}; run align.evaluate again")
        answers.append(answer)
    if not problems:
        problems += _gaps(path, seen)
    if problems:
        raise UserError(*_limited(path, problems))
    return answers


def _gaps(path: Path, seen: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Prompts and samples count from 0 without a gap: where there is one, lines are missing."""
    samples: dict[int, set[int]] = {}
    for prompt, sample in seen:
        samples.setdefault(prompt, set()).add(sample)
    if not samples:
        yield f"{path}: there are no answers in it; run align.evaluate again"
    for prompt in range(len(samples)):
        if prompt not in samples:
            yield f"{path}: prompt {prompt} has no answer, but later ones do; run align.evaluate again"
        elif lost := set(range(len(samples[prompt]))) - samples[prompt]:
            yield f"{path}: sample {min(lost)} of prompt {prompt} is missing; run align.evaluate again"


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        yield f"{'.'.join(map(str, fault['loc'])) or 'the line'}: {fault['msg'][:1].lower() + fault['msg'][1:]}"


def _limited(path: Path, problems: list[str]) -> list[str]:
    more = len(problems) - TOLD
    return problems[:TOLD] + ([f"{path}: and {more} more like these"] if more > 0 else [])


def _arranged(folder: Path, name: str, group: str, about: About, answers: Sequence[Answer]) -> Evaluated:
    shape = max(a.prompt for a in answers) + 1, max(a.sample for a in answers) + 1
    names = sorted({score for a in answers for score in a.scores})
    scores = {score: np.full(shape, np.nan) for score in names}
    lengths, ended, log_ratio, kl = (np.full(shape, np.nan) for _ in range(4))
    first: list[Answer | None] = [None] * shape[0]
    for a in answers:
        at = a.prompt, a.sample
        for score, got in a.scores.items():
            scores[score][at] = np.nan if got is None else got
        lengths[at], ended[at], log_ratio[at] = a.tokens, a.ended, a.logprob - a.ref_logprob
        kl[at] = np.nan if a.kl is None else a.kl
        known = first[a.prompt]
        if known is None or a.sample < known.sample:
            first[a.prompt] = a
    told = [a for a in first if a is not None]
    texts = [a.key for a in told], [a.prompt_text for a in told], [a.response for a in told]
    return Evaluated(folder, name, group, about, *texts, scores, lengths, ended, log_ratio, kl)


def check_alike(runs: Sequence[Evaluated], wanted: Sequence[str]) -> None:
    """Raise UserError unless the runs can be compared: one trunk, tokenizer and list of prompts, all scores there."""
    first, problems = runs[0], []
    for run in runs[1:]:
        for what, own, other in (
            ("trunk (fingerprint", run.about.fingerprint, first.about.fingerprint),
            ("tokenizer (hash", run.about.tokenizer, first.about.tokenizer),
        ):
            if own != other:
                problems.append(
                    f"{run.path}: its {what} {own}) is not that of {first.path} ({other}); "
                    "compare runs that started from one model"
                )
        if len(run.keys) != len(first.keys):
            problems.append(
                f"{run.path}: {len(run.keys)} prompts, but {first.path} has {len(first.keys)}; "
                "evaluate both on the same prompts"
            )
        elif run.keys != first.keys or run.about.prompts != first.about.prompts:
            differs = next((i for i, (a, b) in enumerate(zip(run.keys, first.keys, strict=True)) if a != b), None)
            where = "the hash of its prompts" if differs is None else f"prompt {differs}"
            problems.append(f"{run.path}: {where} differs from that of {first.path}; evaluate both on the same prompts")
    for name in {run.name: None for run in runs}:
        same = [str(run.path) for run in runs if run.name == name]
        if len(same) > 1:
            problems.append(f"{' and '.join(same)}: both are called {name!r}; give them names (compare.runs.0.name)")
    for score in wanted:
        lacking = [run for run in runs if score not in run.scores]
        known = ", ".join(sorted({name for run in runs for name in run.scores})) or "none"
        if len(lacking) == len(runs):
            problems.append(f"compare: no run has a score {score!r}; their scores are: {known}")
            continue
        problems += [
            f"{run.path}: no score {score!r}; its scores are: {', '.join(run.scores) or 'none'}" for run in lacking
        ]
        kinds = {run.path: run.about.scores.get(score, "not told") for run in runs if score in run.scores}
        problems += [
            f"{path}: its score {score!r} is {kind}, but that of {first.path} is {kinds[first.path]}; "
            "evaluate both with the same"
            for path, kind in kinds.items()
            if kind != kinds.get(first.path, kind)
        ]
        problems += [
            f"{run.path}: every {score!r} score is null: the judge failed on all answers; run align.evaluate again"
            for run in runs
            if score in run.scores and not np.isfinite(run.scores[score]).any()
        ]
    if problems:
        raise UserError(*problems)
