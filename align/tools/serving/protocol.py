"""What a request may ask: OpenAI's chat completions and completions, with vLLM's names for what those lack.

A setting that would change the answer and is not known here is refused. One that could be ignored without a difference
is ignored.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from align.models.sampling.choice import Sampling
from align.recipe.errors import UserError, brief

MOST_CHOICES = 128
MOST_AT_ONCE = 1024  # answers of one request, to all its prompts
MOST_TOP = 20
COLDEST = 1e-5  # below it the likeliest token is taken, as by vLLM: logits divided by less are no numbers
MOST_STOPS, LONGEST_STOP = 16, 256
WITHOUT_EFFECT = {
    *("user", "store", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"),
    *(
        "request_id",
        "priority",
        "lora_int_id",
        "prompt_cache_retention",
        "verbosity",
        "skip_special_tokens",
        "cache_salt",
    ),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # settings that are not there, by the values that ask for nothing
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "parallel_tool_calls": (None, True),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "chat_template_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "use_beam_search": (None, False),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}

Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Kind = TypeVar("Kind", bound=BaseModel)


class Faulty(UserError):
    """A request that cannot be answered as it is."""

    status = 400


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    include_usage: bool = False


class Asking(BaseModel):
    """What both have in common."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are told; None: no log-probabilities."""
        raise NotImplementedError

    def key(self) -> int:
        """What fixes the draws: the seed, or a new one."""
        return secrets.randbits(63) if self.seed is None else self.seed % 2**64

    def sampling(self, most: int) -> Sampling:
        """For answers of at most so many tokens."""
        return Sampling(
            most,
            min_new=min(self.min_tokens or 0, most),
            temperature=1.0 if self.temperature is None else self.temperature * (self.temperature >= COLDEST),
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=self.stops,
        )


class ChatAsking(Asking):
    """POST /v1/chat/completions."""

    messages: list[Any]
    tools: list[Any] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def told_tools(self) -> list[Any] | None:
        """The tools that the template writes."""
        return None if (self.model_extra or {}).get("tool_choice") == "none" else self.tools

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsking(Asking):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ScoreAsking(BaseModel):
    """POST /score. `messages`: a conversation or several; `text_1`, `text_2`: prompts and answers; `input`: texts."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    model: str
    messages: list[Any] | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    input: str | list[str] | None = None


class LoadAsking(BaseModel):
    """POST /v1/load_lora_adapter, under vLLM's names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=100)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAsking(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    lora_name: Annotated[str, Field(min_length=1, max_length=100)]


def read(body: bytes, kind: type[Kind]) -> Kind:
    """A request's body. Raises Faulty with what is wrong in it."""
    try:
        given = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Faulty(f"the body is not JSON: {reason}") from None
    if not isinstance(given, dict):
        raise Faulty("the body is to be a JSON object")
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        raise Faulty(*_told(error)) from None
    for name, value in (asked.model_extra or {}).items():
        if name in WITHOUT_EFFECT:
            continue
        if name not in NEUTRAL:
            raise Faulty(f"{brief(name)}: this server does not know this setting")
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
        ):
            wanted = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name][1:])
            raise Faulty(f"{name}: this server takes only {wanted}")
    return asked


def _told(error: ValidationError) -> list[str]:
    """A line for each field that is wrong: of a value that may be of several kinds, what is wrong in the kind that it
    has, or all that it may be."""
    told: dict[str, dict[str, bool]] = {}
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        field = str(fault["loc"][0]) if fault["loc"] else ""
        told.setdefault(field, {})[fault["msg"]] = fault["type"].endswith(("_type", "_from_float"))
    lines = []
    for field, faults in told.items():
        inside = [message for message, is_kind in faults.items() if not is_kind]
        lines.append(brief(f"{field or 'body'}: {inside[0] if inside else ' or '.join(faults)}"))
    return lines


def no_constant(name: str) -> Literal[0]:
    """For JSON: NaN and the infinities are none."""
    raise ValueError(f"{name} is no JSON")
