"""The section that names one place that rows come from."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from align.recipe.paths import Location
from align.recipe.section import PositiveInt, Section

FIGURES = ("_low", "_high", "_share", "_edges", "_seconds", "_per_second")  # what names of figures may end in


class Source(Section):
    """One place that rows come from."""

    path: Location
    """A JSON, JSONL, CSV, TSV, Parquet or text file (also `.gz`), a folder of them, a pattern such as `data/*.jsonl` or
    `data/**/*.csv`, or a hub data set id."""
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text",
        "pairs", "transcripts", "ranked", "labelled", "classes", "prompts",
    ] = "auto"  # fmt: skip
    """The shape of its rows. `auto` looks at the columns and prints what it found."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Passes over this source in one epoch: 2.0 shows every row twice, 0.5 a seeded half. With `weigh_by: tokens`, its
    part of an epoch's tokens."""
    columns: dict[str, str | None] = Field(default_factory=dict)
    """Rename columns: the format's name to the file's, for example `{prompt: question, completion: answer}`. A column
    mapped to null is not read: `{label: null}`."""
    turn_keys: dict[str, str] = Field(default_factory=dict)
    """Rename the keys of turns: ours to the file's, for example `{role: speaker, content: utterance}`."""
    roles: dict[str, Literal["system", "user", "assistant", "tool", "tool_call"]] = Field(default_factory=dict)
    """Who speaks: the file's name to the role, for example `{customer: user, agent: assistant}`."""
    control_tokens: bool = False
    """Words such as `<|im_end|>` in these rows are control tokens, as in texts that a chat template has written before.
    Otherwise they are text."""
    limit: PositiveInt | None = None
    """Read only this many rows."""
    title: str | None = None
    """Held-out rows of the sources with this title have figures of their own besides: `loss/<title>`, and so on."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""

    @field_validator("title")
    @classmethod
    def _is_no_figure(cls, title: str | None) -> str | None:
        if title is not None and (title.endswith(FIGURES) or not re.fullmatch(r"[\w.-]+", title)):
            ends = ", ".join(FIGURES)
            raise ValueError(f"take letters, digits, `.`, `-` and `_`, without an ending of figures ({ends})")
        return title
