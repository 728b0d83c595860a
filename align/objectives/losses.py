"""Losses of reward models, DPO and its variants, PPO and GRPO: pure functions of log-probabilities and scores.

Nothing is reduced here but tokens into paths: a stage sums what it is given and divides by the global count.

Shapes: n labelled tokens, P paths (answers), m pairs of a better and a worse answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def path_counts(path: Tensor, paths: int) -> Tensor:
    """path (n,) int64 -> (P,) int64, the labels of every path."""
    assert path.ndim == 1, path.shape
    counts = torch.bincount(path, minlength=paths)
    assert len(counts) == paths, (len(counts), paths)
    return counts


def path_sums(logprobs: Tensor, path: Tensor, paths: int) -> Tensor:
    """logprobs (n,), path (n,) int64 in ascending order, as a forest has it -> (P,): log p(y | x), y a path's labels.

    Summed in float64 and always in one order: differences of these sums matter, and repeat to the last bit.
    """
    assert logprobs.ndim == 1, logprobs.shape
    assert logprobs.shape == path.shape, (logprobs.shape, path.shape)
    assert (path[1:] >= path[:-1]).all(), "labels of one path stand together"
    sums = torch.segment_reduce(logprobs.double(), "sum", lengths=path_counts(path, paths), unsafe=True)
    return sums.to(logprobs.dtype)


def preference_pairs(owner: Tensor, adjacent: bool) -> tuple[Tensor, Tensor]:
    """owner (P,) int64, the tree of each path, paths of a tree best first -> (better (m,), worse (m,)), int64 indices.

    All pairs i < j within each tree (Ouyang et al. 2022, arXiv 2203.02155), or only i and i + 1.
    """
    assert owner.ndim == 1, owner.shape
    order = torch.arange(len(owner), device=owner.device)
    later = order[None] - order[:, None]
    paired = (later == 1) if adjacent else (later > 0)
    better, worse = (paired & (owner[:, None] == owner[None])).nonzero(as_tuple=True)
    return better, worse


def bradley_terry(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_better - r_worse - margin), (m,) and (m,) -> (m,).

    Bradley & Terry 1952 as in Ouyang et al. 2022 (arXiv 2203.02155); the margin as in Touvron et al. 2023 (arXiv
    2307.09288).
    """
    assert better.shape == worse.shape, (better.shape, worse.shape)
    assert better.ndim == 1, better.shape
    return -logsigmoid(better - worse - margin)


def centring(better: Tensor, worse: Tensor) -> Tensor:
    """(r_better + r_worse)^2, (m,) and (m,) -> (m,): holds scores, which pairs fix only up to a constant, around 0.

    Eisenstein et al. 2023 (arXiv 2312.09244).
    """
    assert better.shape == worse.shape, (better.shape, worse.shape)
    assert better.ndim == 1, better.shape
    return (better + worse).square()


def sigmoid(ratio: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h (m,) -> (m,), e the share of pairs thought mislabelled.

    DPO (Rafailov et al. 2023, arXiv 2305.18290), h = log p(c)/ref(c) - log p(r)/ref(r); conservative where e > 0
    (Mitchell 2023). Written as -log sigmoid(beta h) + e beta h, the same thing, which is log 2 at h = 0 for every e.
    """
    assert ratio.ndim == 1, ratio.shape
    assert 0 <= label_smoothing <= 0.5, label_smoothing
    logits = beta * ratio
    return label_smoothing * logits - logsigmoid(logits)


def robust(ratio: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e), h (m,) -> (m,).

    Unbiased where a share e < 1/2 of the pairs is flipped (Chowdhury et al. 2024, arXiv 2403.00409). Written as
    -log sigmoid(beta h) - e beta h / (1 - 2e), the same thing. Has no lower bound where e > 0.
    """
    assert ratio.ndim == 1, ratio.shape
    assert 0 <= label_smoothing < 0.5, label_smoothing
    logits = beta * ratio
    return -logsigmoid(logits) - label_smoothing / (1 - 2 * label_smoothing) * logits


def ipo(ratio: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, h (m,) -> (m,); beta is the paper's tau.

    Azar et al. 2023 (arXiv 2310.12036), eq. 17. There h is of whole answers. TRL, with the authors' consent, takes
    each answer's log-ratio per token; to do as TRL does, divide by `path_counts` before the difference.
    """
    assert ratio.ndim == 1, ratio.shape
    return (ratio - 1 / (2 * beta)).square()


def hinge(ratio: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h), h (m,) -> (m,). SLiC (Zhao et al. 2023, arXiv 2305.10425) on DPO's log-ratios, as in RSO
    (Liu et al. 2023, arXiv 2309.06657)."""
    assert ratio.ndim == 1, ratio.shape
    return torch.relu(1 - beta * ratio)


def simpo(better: Tensor, worse: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (l_better - l_worse) - gamma), (m,) and (m,) -> (m,), l the mean log-probability per token.

    Meng et al. 2024 (arXiv 2405.14734), eq. 6. Here gamma is the margin itself; recipes often give gamma / beta.
    """
    assert better.shape == worse.shape, (better.shape, worse.shape)
    assert better.ndim == 1, better.shape
    return -logsigmoid(beta * (better - worse) - gamma)


def odds_ratio(better: Tensor, worse: Tensor) -> Tensor:
    """-log sigmoid(log odds(better) - log odds(worse)), odds(l) = e^l / (1 - e^l), (m,) and (m,) -> (m,).

    l < 0 is the mean log-probability per token; 0, a certain answer, is taken as the nearest number below.
    """
    assert better.shape == worse.shape, (better.shape, worse.shape)
    assert better.ndim == 1, better.shape
    return -logsigmoid(_log_odds(better) - _log_odds(worse))


def _log_odds(logprob: Tensor) -> Tensor:
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))


def orpo(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """-l_better + beta `odds_ratio`, (m,) and (m,) -> (m,), l the mean log-probability per token; beta is lambda there.

    Hong et al. 2024 (arXiv 2403.07691), eq. 6. TRL's likelihood term runs over prompt and answer and weighs tokens
    alike over the batch; here it is the paper's, of the answer alone, pair by pair.
    """
    return beta * odds_ratio(better, worse) - better


def kto(
    ratio: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - sigmoid(s beta (h - z0))), h (P,) and desirable (P,) bool -> (P,); s = 1 where desirable, else -1.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8. h = log p(y)/ref(y) of one answer; z0, `baseline`, estimates
    KL(p, ref) as the mean h of answers put to other prompts, at least 0, over all processes, without gradient.
    """
    assert ratio.shape == desirable.shape, (ratio.shape, desirable.shape)
    assert ratio.ndim == 1, ratio.shape
    assert desirable.dtype == torch.bool, desirable.dtype
    away = beta * (ratio - baseline)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(ratio.dtype)
    return weight * torch.sigmoid(torch.where(desirable, -away, away))


def response_log_ratios(log_ratio: Tensor, path: Tensor, paths: int, per_token: bool) -> Tensor:
    """Of each token the log-ratio of its whole response, (n,) and path (n,) -> (n,): its tokens' sum, or their mean.

    The sum is the ratio of a response that counts as one action (RLOO: Ahmadian et al. 2024, arXiv 2402.14740); the
    mean, `per_token`, is GSPO's (Zheng et al. 2025, arXiv 2507.18071, eq. 7).
    """
    assert log_ratio.shape == path.shape, (log_ratio.shape, path.shape)
    sums = path_sums(log_ratio, path, paths)
    return (sums / path_counts(path, paths).clamp(min=1) if per_token else sums)[path]


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), log r = log p / p_old, all (n,) -> loss (n,), and (n,) bool where the
    clip decides.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, with one e on both sides; two, as in DAPO (Yu et al. 2025, arXiv
    2503.14476), eq. 10. With `dual_clip` c > 1 + high the loss of a token with A < 0 stays below -A c, whatever its
    ratio (Ye et al. 2019, arXiv 1912.09729, eq. 5).
    """
    assert log_ratio.shape == advantages.shape, (log_ratio.shape, advantages.shape)
    assert dual_clip is None or dual_clip > 1, dual_clip
    ratio = log_ratio.exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, held)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, held > free


def weighted_policy_loss(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(r, 1 + high) A log p, all (n,) -> loss (n,), and (n,) bool where the bound holds the ratio.

    CISPO (MiniMax 2025, arXiv 2506.13585), eq. 4: the ratio is a weight without gradient, so that no token is left out.
    At r = 1 its value is not PPO's, its gradient is.
    """
    assert logprobs.shape == log_ratio.shape == advantages.shape, (logprobs.shape, log_ratio.shape)
    ratio = log_ratio.detach().exp()
    return -ratio.clamp(max=1 + clip_high) * advantages * logprobs, ratio > 1 + clip_high


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2, all (n,) -> loss (n,), and where the clip decides.

    As in Ouyang et al. 2022 and "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031).
    """
    assert values.shape == old_values.shape == returns.shape, (values.shape, old_values.shape, returns.shape)
    free = (values - returns).square()
    held = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
    return torch.maximum(free, held) / 2, held > free
