"""Beam search: the likeliest responses, not drawn ones (Graves 2012, 1211.3711; Wu et al. 2016, 1609.08144).

Of each prompt the k likeliest beginnings go on. One that ends is worth log p / length^alpha, its end token counted. The
best k that ended are kept, and a prompt is done when its likeliest beginning, taken at its present length, is worth no
more than the worst of them. This is transformers' `generate` with `early_stopping=False`, token by token: a penalty of
repetition acts on log-probabilities, an end that is not among a step's k best is dropped, and for alpha > 0 a longer
response that might have come to more is not waited for.

Shapes: n prompts that go on, w beams of each (1 at first, then k), K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from align.models.sampling.rows import Response, Rows


class Hypotheses:
    """The best ended responses to one prompt, best first."""

    def __init__(self, most: int, length_penalty: float) -> None:
        self.most, self.length_penalty = most, length_penalty
        self.best: list[tuple[float, Response]] = []

    def add(self, logprob: float, response: Response) -> None:
        """One that came to its end; it stays while no `most` others are worth more."""
        self.best.append((self._worth(logprob, len(response.tokens)), response))
        self.best = sorted(self.best, key=lambda one: -one[0])[: self.most]

    def improvable(self, logprob: float, length: int) -> bool:
        """Whether a beginning, worth what it is at its present length, would get among them."""
        return len(self.best) < self.most or self._worth(logprob, length) > self.best[-1][0]

    def _worth(self, logprob: float, length: int) -> float:
        return logprob / length**self.length_penalty


def search(rows: Rows, prompts: int, heed: Callable[[list[int]], None] | None) -> list[list[Response]]:
    """The best `beams` responses to each prompt, best first. `rows`: one a prompt.

    `heed` is called before each step, with nothing: no token is certain before the end.
    """
    sampling, device, k = rows.sampling, rows.logits.device, rows.sampling.beams
    found = [Hypotheses(k, sampling.length_penalty) for _ in range(prompts)]
    going = list(range(prompts))
    said = torch.zeros(prompts, 1, 0, dtype=torch.long, device=device)  # (n, w, t)
    scores = torch.zeros(prompts, 1, device=device)  # (n, w)
    for t in range(sampling.max_new):
        if heed:
            heed([])
        # 1. The best continuations of all beams: so many that k go on even where every beam's best is to end.
        (n, w), vocabulary = scores.shape, rows.logits.shape[1]
        logprobs = rows.admitted(rows.logits.log_softmax(-1), t).view(n, w, vocabulary)
        count = min(k * max(2, 1 + len(rows.ends)), w * vocabulary)
        values, places = (scores[:, :, None] + logprobs).flatten(1).topk(count)  # (n, K), best first
        beams, tokens = places // vocabulary, places % vocabulary
        said = torch.cat([_chosen(said, beams), tokens[:, :, None]], -1)  # (n, K, t + 1)

        # 2. Those among the k best that end, or are cut off, are responses.
        over = _over(rows, said, tokens)
        for i, prompt in enumerate(going):
            for value, response, ended in zip(*(part[i, :k].tolist() for part in (values, said, over)), strict=True):
                if (ended or t + 1 == sampling.max_new) and value > -torch.inf:
                    found[prompt].add(value, Response(np.array(response, np.int32), ended))

        # 3. The k best of the others go on, where they can still come to more.
        scores, chosen = values.masked_fill(over, -torch.inf).topk(min(k, count))  # (n, k)
        heads = scores[:, 0].tolist()
        alive = [i for i in range(n) if heads[i] > -torch.inf and found[going[i]].improvable(heads[i], t + 1)]
        if not alive or t + 1 == sampling.max_new:
            break
        parents = beams.gather(1, chosen) + w * torch.arange(n, device=device)[:, None]
        going, scores, said = [going[i] for i in alive], scores[alive], _chosen(said, chosen)[alive]
        rows.step(said[:, :, -1].flatten(), parents[alive].flatten())
    return [[response for _, response in hypotheses.best] for hypotheses in found]


def _chosen(said: Tensor, which: Tensor) -> Tensor:
    """said (n, w, t), which (n, m) of the w -> (n, m, t)."""
    return said.gather(1, which[:, :, None].expand(-1, -1, said.shape[2]))


def _over(rows: Rows, said: Tensor, tokens: Tensor) -> Tensor:
    """said (n, K, t), tokens (n, K) the last of them -> (n, K) bool: by an end-of-turn token or a stop text."""
    over = torch.isin(tokens, rows.ends)
    if rows.stop:
        over |= torch.tensor([[rows.stopped(one) for one in own] for own in said], device=over.device)
    return over
