"""How a budget is shared among the matrices of a rule, and the search for the score threshold that meets it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finllm_prune.errors import InputError

_BINS = 4096
_FEW = 1 << 17
_STRIDE = 64
_ROUNDING = 1e-9  # 0.07 * 100 is a little above 7, and 1 - 0.9 a little below 0.1


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
    """Each grid keeps the same fraction of its units: equal widths, so that a compact model has one plain config.

    Args:
        multiple: kept widths are the nearest multiple of it (8, 16, 64: what matrix kernels like), at least one of them.
    """

    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InputError(f"budget uniform: multiple must be at least 1, not {self.multiple}")

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        return [select([s], self._width(density, s.numel()))[0] for s in scores]

    def _width(self, density: float, units: int) -> int:
        if density >= 1:
            return units
        width = round(density * units / self.multiple) * self.multiple
        return min(units, max(self.multiple, width))


@dataclass(frozen=True)
class Global:
    """One threshold over all grids of the rule; the best unit of each grid is always kept.

    Args:
        floor: each grid keeps at least this fraction of its units.
        ceiling: and at most this fraction, as far as the rule's sparsity asks for cuts at all.
    """

    floor: float = 0.0
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < self.ceiling <= 1:
            raise InputError(
                f"budget global: it must hold that 0 <= floor < ceiling <= 1; got {self.floor} and {self.ceiling}"
            )

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        least = [max(1, math.ceil(self.floor * s.numel() - _ROUNDING)) for s in scores]
        most = [
            max(low, math.floor(self.ceiling * s.numel() + _ROUNDING)) for low, s in zip(least, scores, strict=True)
        ]
        keep = max(sum(least), round(density * sum(s.numel() for s in scores)))
        masks = select(scores, keep)
        kept = [int(mask.sum()) for mask in masks]
        if all(low <= k <= high for low, k, high in zip(least, kept, most, strict=True)):
            return masks
        # Every grid's best units, up to the floor, come before all others; those beyond the ceiling after all others.
        bounds = [torch.aminmax(s) for s in scores]
        span = 1.0 + max(float(b.max) for b in bounds) - min(float(b.min) for b in bounds)
        contest = [
            s + 2.0 * span * (select([s], low)[0].float() - (~select([s], high)[0]).float())
            for s, low, high in zip(scores, least, most, strict=True)
        ]
        return select(contest, keep)


@dataclass(frozen=True)
class Sensitivity:
    """Each grid keeps what a dry pass, before training, shows that the loss needs (``finllm_prune.pruning.sensitivity``).

    Args:
        levels: the sparsities at which each grid is tried alone, ascending, between 0 and 1.
        rows: training rows on which the loss is measured.
        densities: the outcome, one per grid, at the rule's final sparsity; the run fills it in.
    """

    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    rows: int = 128
    densities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.levels), (*self.levels, 1.0), strict=True))
        if not (self.levels and rising) or self.rows < 1:
            raise InputError(
                "budget sensitivity: levels must ascend between 0 and 1 and rows be at least 1; "
                f"got {list(self.levels)} and {self.rows}"
            )

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        if len(self.densities) != len(scores):
            raise InputError(
                f"budget sensitivity: {len(self.densities)} densities for {len(scores)} matrices; "
                "measure them with finllm_prune.training.measure_sensitivity, as a run does, or use budget: global"
            )
        sizes = [s.numel() for s in scores]
        final = sum(n * d for n, d in zip(sizes, self.densities, strict=True)) / sum(sizes)
        part = (1.0 - density) / (1.0 - final)
        return [
            Uniform().share([s], 1.0 - part * (1.0 - own))[0] for s, own in zip(scores, self.densities, strict=True)
        ]


BUDGETS: dict[str, type[Budget]] = {"uniform": Uniform, "global": Global, "sensitivity": Sensitivity}
