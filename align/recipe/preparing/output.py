"""What a prepared set looks like on the disk."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.recipe.section import Fraction, PositiveInt, Section

Side = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]


class Output(Section):
    """The files of the set."""

    format: Literal["parquet", "jsonl"] = "parquet"
    """Of every file."""
    shard_rows: PositiveInt = 20_000
    """Most rows in one file. A file is also ended at 64 MB of JSON."""
    keep: list[str] = Field(default_factory=list)
    """Further columns of the records that are written, such as `[id, answer]`, by the format's names or the file's own.
    What the steps do to texts, they do to these too."""
    split: dict[Side, Fraction] = Field(default_factory=dict)
    """Shares of the rows by the name of a side, such as `{eval: 0.02, test: 0.02}`; the rest is `train`. No prompt and
    no group of duplicates stands on two sides."""

    @model_validator(mode="after")
    def _fits_together(self) -> Output:
        if "train" in self.split:
            raise ValueError("`split`: what is left is `train`; name the other sides alone")
        if sum(self.split.values()) >= 1:
            raise ValueError("`split`: the shares leave nothing for `train`")
        return self
