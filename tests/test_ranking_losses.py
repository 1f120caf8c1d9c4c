"""The losses of a reranker, against their papers' formulas in plain numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from finllm_prune.tasks.ranking_losses import ranking_loss

Row = NDArray[np.float64]


def bce(s: Row, y: Row) -> float:
    p = 1 / (1 + np.exp(-s))
    return float(np.mean([-math.log(p[i] if y[i] > 0 else 1 - p[i]) for i in range(len(s))]))


def over_pairs(s: Row, y: Row, of_pair) -> float:
    losses = [of_pair(s[i] - s[j]) for i in range(len(s)) for j in range(len(s)) if y[i] > y[j]]
    return float(np.mean(losses)) if losses else 0.0


def listnet(s: Row, y: Row) -> float:
    gains = 2.0**y - 1
    return float(-(gains / max(1.0, gains.sum()) * np.log(np.exp(s) / np.exp(s).sum())).sum())


def ndcg_loss2pp(s: Row, y: Row, mu: float = 10.0) -> float:
    def discount(k: float) -> float:
        return math.log2(1 + k)

    rank = {int(i): k + 1 for k, i in enumerate(np.argsort(-s, kind="stable"))}
    best = sum((2.0**v - 1) / discount(k + 1) for k, v in enumerate(sorted(y, reverse=True)))
    total = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            if y[i] > y[j]:
                apart = abs(rank[i] - rank[j])
                rho = abs(1 / discount(rank[i]) - 1 / discount(rank[j]))
                delta = abs(1 / discount(apart) - 1 / discount(apart + 1))
                gain = abs(2.0 ** y[i] - 2.0 ** y[j]) / best
                total += (rho + mu * delta) * gain * math.log2(1 + math.exp(-(s[i] - s[j])))
    return total


REFERENCES = {
    "bce": bce,
    "pairwise": lambda s, y: over_pairs(s, y, lambda x: max(0.0, 0.7 - x)),
    "ranknet": lambda s, y: over_pairs(s, y, lambda x: math.log(1 + math.exp(-x))),
    "listnet": listnet,
    "lambda": ndcg_loss2pp,
}
scores = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, n, elements=st.floats(-4, 4, width=16), unique=True),
        arrays(np.int64, n, elements=st.integers(0, 3)),
    )
)


@pytest.mark.parametrize("name", REFERENCES)
@given(rows=st.lists(scores, min_size=1, max_size=3))
def test_loss_is_the_paper_s_whatever_the_rows_are_filled_up_with(name, rows) -> None:
    longest = max(len(s) for s, _ in rows)
    filled = torch.stack([torch.tensor(np.pad(s, (0, longest - len(s)), constant_values=9.0)) for s, _ in rows]).float()
    relevance = torch.stack([torch.tensor(np.pad(y, (0, longest - len(y)), constant_values=-100)) for _, y in rows])
    filled.requires_grad_()
    loss = ranking_loss(name, margin=0.7)(filled, relevance)
    assert loss.item() == pytest.approx(np.mean([REFERENCES[name](s, y) for s, y in rows]), rel=1e-4, abs=1e-5)
    if loss.requires_grad:
        loss.backward()
        assert torch.isfinite(filled.grad).all()
        assert (filled.grad[relevance < 0] == 0).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_judgements_from_1_to_1000_are_no_overflow(name: str) -> None:
    found = torch.zeros(1, 3, requires_grad=True)
    loss = ranking_loss(name, margin=0.7)(found, torch.tensor([[1000, 1, 0]]))
    loss.backward()
    assert loss.isfinite()
    assert found.grad is not None
    assert found.grad[0, 0] < 0 < found.grad[0, 2], "the better passage rises"
