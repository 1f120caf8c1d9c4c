"""How a budget is shared among the matrices of a rule, and the search for the score threshold that meets it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_BINS = 4096
_FEW = 1 << 17
_STRIDE = 64


def kth_largest(scores: list[Tensor], k: int) -> Tensor:
    """The exact k-th largest value over all tensors, by a bracket search: no full sort and no concatenation.

    A strided sample gives the first bracket, histograms narrow it while it holds many values. Both only steer the search:
    what lies above the bracket is counted by comparison, so the value is exact, and the same on any device.

    Args:
        scores: finite fp32 tensors of any shape.
        k: 1 <= k <= the number of all values.
    """
    flat = [s.reshape(-1) for s in scores]
    total = sum(s.numel() for s in flat)
    bounds = [torch.aminmax(s) for s in flat]
    low = min(float(b.min) for b in bounds)
    high = max(float(b.max) for b in bounds)
    above, inside = 0, total
    propose = _by_sample
    while inside > _FEW and low < high:
        tight_low, tight_high = propose(flat, k, above, low, high)
        tight_above = sum(int(torch.count_nonzero(s > tight_high)) for s in flat)
        tight_inside = sum(int(torch.count_nonzero(s >= tight_low)) for s in flat) - tight_above
        holds = tight_above < k <= tight_above + tight_inside
        if holds and tight_inside < inside:
            low, high, above, inside = tight_low, tight_high, tight_above, tight_inside
        elif propose is _by_histogram:
            break
        propose = _by_histogram
    rest = torch.cat([s[(s >= low) & (s <= high)] for s in flat])
    return rest.kthvalue(rest.numel() - (k - above) + 1).values


def _by_sample(flat: list[Tensor], k: int, above: int, low: float, high: float) -> tuple[float, float]:
    """A bracket around the k-th largest of a strided sample, four standard errors wide on either side."""
    sample = torch.cat([s[::_STRIDE] for s in flat]).sort(descending=True).values
    n = sample.numel()
    part = k / sum(s.numel() for s in flat)
    slack = 4.0 * (part * (1.0 - part) * n) ** 0.5 + 2.0
    first, last = int(part * n - slack), int(part * n + slack)
    return (low if last >= n else float(sample[last]), high if first < 0 else float(sample[first]))


def _by_histogram(flat: list[Tensor], k: int, above: int, low: float, high: float) -> tuple[float, float]:
    """The bin of [low, high] that holds the k-th largest, with one bin of slack on either side for rounding."""
    counts = torch.stack([torch.histc(s, _BINS, low, high) for s in flat]).double().sum(0)
    from_top = counts.flip(0).cumsum(0)
    place = _BINS - 1 - int(torch.searchsorted(from_top, float(k - above)))
    width = (high - low) / _BINS
    return max(low, low + (place - 1) * width), min(high, low + (place + 2) * width)


def select(scores: list[Tensor], k: int) -> list[Tensor]:
    """Masks that keep exactly the k highest scores over all tensors; ties go to the lower index."""
    threshold = kth_largest(scores, k)
    masks = [s >= threshold for s in scores]
    excess = sum(int(torch.count_nonzero(m)) for m in masks) - k
    for score, mask in zip(reversed(scores), reversed(masks), strict=True):
        if excess == 0:
            break
        ties = (score.reshape(-1) == threshold).nonzero().squeeze(1)[-excess:]
        mask.view(-1)[ties] = False
        excess -= ties.numel()
    return masks


class Budget(Protocol):
    """A way to share one density among the score grids of a rule. At least one unit of each grid is kept."""

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        """Score grids (fp32, high = keep) -> boolean masks of the same shapes."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Each grid keeps the same fraction of its units: equal widths, so that a compact model has one plain config."""

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        return [select([s], max(1, round(density * s.numel())))[0] for s in scores]


@dataclass(frozen=True)
class Global:
    """One threshold over all grids of the rule; the best unit of each grid is always kept."""

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        keep = max(len(scores), round(density * sum(s.numel() for s in scores)))
        masks = select(scores, keep)
        if all(bool(mask.any()) for mask in masks):
            return masks
        # A grid would be emptied: its best unit, and that of every grid, leaves the contest for the rest.
        best = [int(s.argmax()) for s in scores]
        bounds = [torch.aminmax(s) for s in scores]
        lowest, highest = min(float(b.min) for b in bounds), max(float(b.max) for b in bounds)
        contest = [
            s.flatten().index_fill(0, torch.tensor([i], device=s.device), 2 * lowest - highest - 1)
            for s, i in zip(scores, best, strict=True)
        ]
        masks = (
            select(contest, keep - len(scores))
            if keep > len(scores)
            else [torch.zeros_like(s, dtype=torch.bool) for s in contest]
        )
        for mask, i in zip(masks, best, strict=True):
            mask[i] = True
        return [mask.view(s.shape) for mask, s in zip(masks, scores, strict=True)]


BUDGETS: dict[str, type[Budget]] = {"uniform": Uniform, "global": Global}
