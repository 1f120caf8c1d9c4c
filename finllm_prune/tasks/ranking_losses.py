"""What a reranker learns from the relevance of a query's passages: one function a loss.

Each takes the scores (rows, passages) of some queries and the relevance of the passages, of the same shape; a relevance below 0
says that there is no passage (rows are filled up to the longest). Each gives the mean over the rows.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RankingLoss = Callable[[Tensor, Tensor], Tensor]
Name = Literal["bce", "pairwise", "ranknet", "listnet", "lambda"]


def ranking_loss(name: Name, margin: float) -> RankingLoss:
    """The loss of that name; ``margin`` is that of ``pairwise``."""
    if name == "pairwise":
        return lambda scores, relevance: pairwise(scores, relevance, margin)
    losses: dict[str, RankingLoss] = {"bce": bce, "ranknet": ranknet, "listnet": listnet, "lambda": lambda_loss}
    return losses[name]


def bce(scores: Tensor, relevance: Tensor) -> Tensor:
    """Each passage alone: cross entropy of ``sigmoid(score)`` against relevant (above 0) or not (Nogueira and Cho 2019).

    https://arxiv.org/abs/1901.04085
    """
    there = relevance >= 0
    losses = F.binary_cross_entropy_with_logits(scores.float(), (relevance > 0).float(), reduction="none")
    return _mean(losses.where(there, 0.0).sum(1), there.sum(1))


def pairwise(scores: Tensor, relevance: Tensor, margin: float = 1.0) -> Tensor:
    """``max(0, margin - (s_i - s_j))`` over pairs of which i is the more relevant one (Herbrich et al. 2000; Joachims 2002)."""
    pairs = _ordered(relevance)
    return _mean(F.relu(margin - _differences(scores)).where(pairs, 0.0).sum((1, 2)), pairs.sum((1, 2)))


def ranknet(scores: Tensor, relevance: Tensor) -> Tensor:
    """``log(1 + exp(-(s_i - s_j)))`` over pairs of which i is the more relevant one (Burges et al. 2005)."""
    pairs = _ordered(relevance)
    return _mean(F.softplus(-_differences(scores)).where(pairs, 0.0).sum((1, 2)), pairs.sum((1, 2)))


def listnet(scores: Tensor, relevance: Tensor) -> Tensor:
    """Cross entropy of the softmax of the scores against the gains ``2^relevance - 1``, as parts of 1 (Cao et al. 2007).

    Cao et al. allow any increasing function of the relevance; with this one a passage that is not relevant has no part, so
    that long lists do not drown the relevant ones.
    """
    gains = _gains(relevance)
    parts = gains / gains.sum(1, keepdim=True).clamp_min(1e-9)
    logs = F.log_softmax(scores.float().masked_fill(relevance < 0, -torch.inf), -1)
    return -(parts * logs.masked_fill(relevance < 0, 0.0)).sum(1).mean()


def lambda_loss(scores: Tensor, relevance: Tensor, mu: float = 10.0) -> Tensor:
    """LambdaLoss with the weights of NDCG-Loss2++ (Wang et al. 2018, https://doi.org/10.1145/3269206.3271784).

    ``(rho_ij + mu * delta_ij) * |G_i - G_j| * log2(1 + exp(-(s_i - s_j)))`` over pairs of which i is the more relevant one:
    G is the gain by the best DCG of the row, ``rho = |1/D_i - 1/D_j|`` of the ranks that the scores give now, and
    ``delta = |1/D_|i-j| - 1/D_(|i-j|+1)|``, with ``D_k = log2(1 + k)``. No gradient flows through the weights.
    """
    pairs = _ordered(relevance)
    with torch.no_grad():
        order = scores.masked_fill(relevance < 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranks = order.argsort(1) + 1
        gains = _gains(relevance)
        best = (
            gains.sort(1, descending=True).values * _discounts(torch.arange(1, gains.shape[1] + 1, device=gains.device))
        ).sum(1)
        gains = gains / best.clamp_min(1e-9)[:, None]
        rho = _differences(_discounts(ranks)).abs()
        apart = _differences(ranks.float()).abs()
        delta = (_discounts(apart.clamp_min(1)) - _discounts(apart + 1)).abs()
        weights = (rho + mu * delta) * _differences(gains).abs()
    # log2(1 + exp(-x)) is softplus(-x) / log(2)
    losses = weights * F.softplus(-_differences(scores)) / torch.log(torch.tensor(2.0))
    return losses.where(pairs, 0.0).sum((1, 2)).mean()


def _ordered(relevance: Tensor) -> Tensor:
    """(rows, i, j): both passages are there and i is the more relevant one."""
    return (relevance[:, :, None] > relevance[:, None, :]) & (relevance >= 0)[:, None, :]


def _differences(values: Tensor) -> Tensor:
    """(rows, i, j): value of i less value of j."""
    values = values.float()
    return values[:, :, None] - values[:, None, :]


def _gains(relevance: Tensor) -> Tensor:
    """``2^relevance - 1`` as parts of ``2^the row's highest relevance``: a judgement of 1 to 1000 is no overflow."""
    grades = relevance.clamp_min(0).float()
    top = grades.amax(1, keepdim=True)
    return torch.exp2(grades - top) - torch.exp2(-top)


def _discounts(ranks: Tensor) -> Tensor:
    """1 / log2(1 + rank)."""
    return 1.0 / torch.log2(1.0 + ranks.float())


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    """The mean over rows of each row's mean over its parts; a row without parts counts 0."""
    return (sums / counts.clamp_min(1)).mean()
