"""The next token of each of several requests, every one with its own settings.

Shapes: b requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from align.models.sampling.choice import Sampling, draw, filtered, penalised
from align.models.sampling.requests import Request, Said

LEAST_LOGPROB = -9999.0  # for a token that cannot be drawn, as vLLM writes it: JSON has no infinity


def chosen(requests: Sequence[Request], logits: Tensor) -> Iterator[Said]:
    """By logits (b, V) float32, which are changed."""
    told = [i for i, request in enumerate(requests) if request.top is not None]
    raw = logits[told].log_softmax(-1) if told else None
    tokens = _tokens(requests, logits)
    if raw is None:
        yield from map(Said, tokens.tolist())
        return
    most = min(max(requests[i].top for i in told), raw.shape[1])
    own = raw.gather(1, tokens[told][:, None])[:, 0].tolist()
    values, best = (part.tolist() for part in raw.topk(most))
    place = {i: number for number, i in enumerate(told)}
    for i, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True)):
        if (j := place.get(i)) is None:
            yield Said(token)
        else:
            top = zip(best[j][: request.top], map(_bounded, values[j]), strict=False)
            yield Said(token, _bounded(own[j]), tuple(top))


def _tokens(requests: Sequence[Request], logits: Tensor) -> Tensor:
    """(b,) int64: those of like settings at once."""
    groups: dict[Sampling, list[int]] = {}
    for i, request in enumerate(requests):
        how = request.sampling
        if how.repetition_penalty != 1:
            logits[i] = penalised(logits[i : i + 1], _seen(request, logits)[None], how.repetition_penalty)[0]
        if len(request.said) < how.min_new:
            logits[i, list(request.voice.ends)] = -torch.inf
        groups.setdefault(how._replace(max_new=0, min_new=0, repetition_penalty=1.0, stop=()), []).append(i)
    tokens = torch.empty(len(requests), dtype=torch.long, device=logits.device)
    for how, members in groups.items():
        part = logits if len(members) == len(requests) else logits[members]
        if how.temperature == 0:
            tokens[members] = part.argmax(-1)
        else:
            uniform = [requests[i].drawn[len(requests[i].said)] for i in members]
            tokens[members] = draw(filtered(part, how), torch.tensor(uniform, dtype=torch.float64).to(part.device))
    return tokens


def _seen(request: Request, logits: Tensor) -> Tensor:
    """(V,) bool: the tokens of a request so far."""
    if request.seen is None:
        request.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        request.seen[torch.from_numpy(request.tokens).long().to(logits.device)] = True
    elif request.said:
        request.seen[request.said[-1]] = True
    return request.seen


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
