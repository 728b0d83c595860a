"""Responses as an OpenAI-compatible server tells them: what `/v1/completions` is asked for, and reading its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.data.templates.ends import turn_ends
from align.models.sampling.choice import Sampling
from align.models.sampling.rows import Response, says_one
from align.models.trunk import Trunk
from align.recipe.errors import UserError
from align.training.rollouts.client import Again, Answer

LEAST = -1e5  # a log-probability; vLLM writes -9999 for minus infinity
SEEDS = 2**53  # whole numbers that any reader of JSON keeps


class Ends(NamedTuple):
    """What ends a response."""

    tokens: frozenset[int]
    texts: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # tokens that have a row in the model

    @classmethod
    def of(cls, trunk: Trunk, how: Sampling) -> Ends:
        """As the trunk's own engine has it."""
        texts = (*how.stop, *turn_ends(trunk.tokenizer).texts)
        return cls(frozenset(trunk.end_tokens), texts, trunk.tokenizer, trunk.rows)

    def place(self, tokens: np.ndarray, how: Sampling) -> int | None:
        """How many tokens there are up to the end of a response, (k,) int32; None where it does not end."""
        for count, token in enumerate(tokens.tolist(), 1):
            if token in self.tokens:
                return count
            if self.texts and count >= how.min_new and says_one(self.tokenizer, tokens[:count], self.texts):
                return count
        return None


def seed_of(key: Sequence[int]) -> int:
    """A seed that the key alone fixes."""
    return int(np.random.default_rng(list(key)).integers(SEEDS))


def asked_for(
    model: str, prompt: Sequence[int], how: Sampling, ends: Ends, seed: int | None = None, salt: str | None = None
) -> dict[str, Any]:
    """The body of a request for one response to a prompt, token ids (l,).

    Everything is said that a server may have a default of its own for. `salt`: requests share what a server keeps of
    a prompt only where it is the same. vLLM keeps keys and values under an adapter's name, so those of a former
    adapter of this name would be taken for the new one's.
    """
    body = {
        "model": model, "prompt": [int(token) for token in prompt], "max_tokens": how.max_new, "n": 1, "stream": False,
        "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k or -1, "min_p": how.min_p,
        "repetition_penalty": how.repetition_penalty, "presence_penalty": 0, "frequency_penalty": 0,
        "min_tokens": how.min_new, "stop_token_ids": sorted(ends.tokens), "skip_special_tokens": False,
        "logprobs": 1, "return_token_ids": True,
    }  # fmt: skip
    if ends.texts:
        body["stop"] = list(ends.texts)
    if seed is not None:
        body["seed"] = seed
    if salt is not None:
        body["cache_salt"] = salt
    return body


def response_of(answer: Answer, prompt: Sequence[int], how: Sampling, ends: Ends, told: str) -> Response:
    """The response in an answer with status 200; `told`: the server, in messages.

    Raises Again for a response that the server broke off, and UserError for one that cannot be learnt from.
    """
    choices = answer.json.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, dict):
        raise UserError(f"{told} answers /v1/completions with something else than one choice: {answer.message!r}")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise Again(f"broke a response off ({reason})")
    ids = choice.get("token_ids")
    if not _are_tokens(ids, ends.vocabulary):
        raise UserError(
            f"{told} tells no `token_ids` of its responses, or tokens that model.base has no row for; it has to know "
            "`return_token_ids` (vLLM from 0.10.2) and to serve the same base"
        )
    if choice.get("prompt_token_ids") not in (None, [int(token) for token in prompt]):
        raise UserError(f"{told} has read another prompt than it was sent (prompt_token_ids)")
    told_of = choice.get("logprobs")
    logprobs = told_of.get("token_logprobs") if isinstance(told_of, dict) else None
    if not _are_logprobs(logprobs, len(ids)):
        raise UserError(f"{told} tells no log-probability of each token of a response (logprobs.token_logprobs)")
    tokens = np.array(ids, np.int32)
    end = ends.place(tokens, how)
    ended = end is not None or isinstance(choice.get("stop_reason"), str)
    length = len(tokens) if end is None else end
    if not ended and reason == "stop":
        raise UserError(
            f"{told} ended a response after token {ids[-1]}, which ends none here, or leaves out of `token_ids` what "
            "ended it; for vLLM, start it with --generation-config vllm"
        )
    if not ended and length < how.max_new:
        raise UserError(
            f"{told} cut a response after {length} of {how.max_new} tokens; raise what it takes at most (vLLM's "
            "--max-model-len)"
        )
    if length > how.max_new:
        raise UserError(f"{told} gave {length} tokens where at most {how.max_new} were asked for")
    return Response(tokens[:length], ended, np.array(logprobs[:length], np.float32))


def _are_tokens(ids: Any, vocabulary: int) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(i) is int and 0 <= i < vocabulary for i in ids)


def _are_logprobs(logprobs: Any, count: int) -> bool:
    if not isinstance(logprobs, list) or len(logprobs) != count:
        return False
    return all(type(x) in (int, float) and LEAST <= x < 0.01 for x in logprobs)  # 0 up to rounding; no nan is
