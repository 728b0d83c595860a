"""The parts that a reward is made of, as a recipe names them, and what they are asked."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from align.data.formats.prompts import Asked
from align.models.roles import CRITIC
from align.recipe.paths import Location
from align.recipe.schema import Section

CALLING = ("timeout", "retries", "on_failure", "processes")  # how a function is called


class RewardPart(Section):
    """One part of the reward; it is one of `adapter`, `model` and `function`."""

    adapter: Location | None = None
    """`final/` folder of a run of align.reward on the same trunk: a role on it."""
    model: Location | None = None
    """Any other sequence-classification checkpoint, a folder or hub id, with its own tokenizer."""
    label: str | int | None = None
    """With `model`: the class whose log-odds are the score, by name or number; needed where it has several."""
    function: str | None = None
    """`package.module:function`, called as function(prompts, responses, rows); it returns a number a response, or None
    where there is none. It may be `async`."""
    timeout: Annotated[float | None, Field(gt=0)] = None
    """With `function`: seconds that a call may take. It is for functions that are `async` or have `processes`. Default:
    as long as it takes."""
    retries: Annotated[int, Field(ge=0)] = 0
    """With `function`: more calls after one that failed or took too long."""
    on_failure: Literal["stop", "leave_out"] = "stop"
    """With `function`: a response without a score ends the run (`stop`), or nothing is learnt from it and metrics count
    it (`leave_out`)."""
    processes: Annotated[int, Field(ge=0)] = 0
    """With `function`: it is called in so many processes of its own, with one response a call. 0: in the run itself,
    with all responses in one call."""
    name: Annotated[str | None, Field(pattern=r"^[\w-]+$")] = None
    """What the part is called in metrics. Default: `reward`, `model`, or the function's name."""
    weight: float = 1.0
    """Its weight in the sum. With 0 it is a judge, which is only watched."""
    mean: float | None = None
    """Taken off the score. Default: an adapter's mean on its demonstrations, else 0."""
    std: Annotated[float | None, Field(gt=0)] = None
    """What the score is then divided by. Default: an adapter's spread on its demonstrations, else 1."""
    clip: Annotated[float | None, Field(gt=0)] = None
    """The most that the result may be away from 0."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardPart:
        if sum(kind is not None for kind in (self.adapter, self.model, self.function)) != 1:
            raise ValueError("a part of the reward is one of `adapter`, `model` and `function`; give exactly one")
        if self.function is not None and not all(self.function.partition(":")):
            raise ValueError(f"`function`: expected package.module:function, found {self.function!r}")
        if self.label is not None and self.model is None:
            raise ValueError("`label` goes with `model`")
        calling = [key for key in CALLING if getattr(self, key) != type(self).model_fields[key].default]
        if self.function is None and calling:
            raise ValueError(f"`{calling[0]}` goes with `function`")
        if self.adapter is not None and self.name in ("default", CRITIC):
            raise ValueError(f"`name`: {self.name} is another role on the trunk")
        return self

    @property
    def title(self) -> str:
        """What it is called."""
        if self.name or self.function is None:
            return self.name or ("reward" if self.adapter else "model")
        return self.function.partition(":")[2]


class Answered(NamedTuple):
    """A response and what it answers, as texts; prompt + response is the text of all tokens decoded together."""

    asked: Asked
    prompt: str
    response: str
