"""How a budget is shared among the matrices of a rule, and the search for the score threshold that meets it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from finllm_prune.errors import InputError
from finllm_prune.pruning.sharding import here, joined, like, mesh_of, total

_BINS = 4096
_FEW = 1 << 17
_STRIDE = 64
_ROUNDING = 1e-9  # 0.07 * 100 is a little above 7, and 1 - 0.9 a little below 0.1


def kth_largest(scores: list[Tensor], k: int) -> Tensor:
    """The exact k-th largest value over all tensors, by a bracket search: no full sort and no concatenation.

    A strided sample gives the first bracket, histograms narrow it while it holds many values. Both only steer the search:
    what lies above the bracket is counted by comparison, so the value is exact, and the same on any device. Where the
    tensors are split among ranks, these add up their counts: one all-reduce for each histogram.

    Args:
        scores: finite fp32 tensors of any shape.
        k: 1 <= k <= the number of all values.
    """
    mesh = mesh_of(scores)
    flat = [here(s).reshape(-1) for s in scores]
    whole = sum(s.numel() for s in scores)
    low, high = _range(flat, mesh)
    above, inside = 0, whole
    propose = _by_sample if mesh is None else _by_histogram
    while inside > _FEW and low < high:
        tight_low, tight_high = propose(flat, mesh, k, above, low, high)
        tight_above, reached = _count(flat, mesh, lambda s: (s > tight_high, s >= tight_low))  # noqa: B023
        tight_inside = reached - tight_above
        holds = tight_above < k <= tight_above + tight_inside
        if holds and tight_inside < inside:
            low, high, above, inside = tight_low, tight_high, tight_above, tight_inside
        elif propose is _by_histogram:
            break
        propose = _by_histogram
    rest = joined(torch.cat([s[(s >= low) & (s <= high)] for s in flat]), mesh, -math.inf)
    return rest.kthvalue(rest.numel() - (k - above) + 1).values


def bounds(score: Tensor) -> tuple[float, float]:
    """The lowest and the highest value, on all ranks; both infinite where there is a NaN."""
    return _range([here(score).reshape(-1)], mesh_of([score]))


def _range(flat: list[Tensor], mesh: DeviceMesh | None) -> tuple[float, float]:
    found = [torch.aminmax(s) for s in flat if s.numel()]  # a rank may hold no row of a small matrix
    ends = [torch.stack([-pair.min, pair.max]) for pair in found] or [flat[0].new_full((2,), -math.inf)]
    highest = torch.stack(ends).amax(0)
    # A maximum over ranks may lose a NaN.
    low, high = total(torch.where(highest.isnan(), math.inf, highest), mesh, dist.ReduceOp.MAX).tolist()
    return -low, high


def _count(flat: list[Tensor], mesh: DeviceMesh | None, which: Callable[[Tensor], Iterable[Tensor]]) -> list[int]:
    """How many values of all tensors are True in each of the masks that ``which`` makes of a tensor."""
    counts = torch.stack([torch.stack([torch.count_nonzero(mask) for mask in which(s)]) for s in flat]).sum(0)
    found: list[int] = total(counts, mesh).tolist()
    return found


def _by_sample(
    flat: list[Tensor], mesh: DeviceMesh | None, k: int, above: int, low: float, high: float
) -> tuple[float, float]:
    """A bracket around the k-th largest of a strided sample, four standard errors wide on either side."""
    sample = torch.cat([s[::_STRIDE] for s in flat]).sort(descending=True).values
    n = sample.numel()
    part = k / sum(s.numel() for s in flat)
    slack = 4.0 * (part * (1.0 - part) * n) ** 0.5 + 2.0
    first, last = int(part * n - slack), int(part * n + slack)
    return (low if last >= n else float(sample[last]), high if first < 0 else float(sample[first]))


def _by_histogram(
    flat: list[Tensor], mesh: DeviceMesh | None, k: int, above: int, low: float, high: float
) -> tuple[float, float]:
    """The bin of [low, high] that holds the k-th largest, with one bin of slack on either side for rounding."""
    counts = total(torch.stack([torch.histc(s, _BINS, low, high) for s in flat]).double().sum(0), mesh)
    from_top = counts.flip(0).cumsum(0)
    place = _BINS - 1 - int(torch.searchsorted(from_top, float(k - above)))
    width = (high - low) / _BINS
    return max(low, low + (place - 1) * width), min(high, low + (place + 2) * width)


def select(scores: list[Tensor], k: int) -> list[Tensor]:
    """Masks that keep exactly the k highest scores over all tensors; ties go to the lower index."""
    threshold = kth_largest(scores, k)
    masks = [here(s) >= threshold for s in scores]
    excess = _count(masks, mesh_of(scores), lambda mask: (mask,))[0] - k
    for score, mask in zip(reversed(scores), reversed(masks), strict=True):
        if excess == 0:
            break
        ties = (here(score).reshape(-1) == threshold).nonzero().squeeze(1)
        mesh = mesh_of([score])
        held = joined(torch.tensor([ties.numel()], device=ties.device), mesh, 0).tolist()
        behind = 0 if mesh is None else sum(held[mesh.get_local_rank() + 1 :])
        mine = min(max(0, excess - behind), ties.numel())
        mask.view(-1)[ties[ties.numel() - mine :]] = False
        excess -= min(excess, sum(held))
    return [like(mask, score) for mask, score in zip(masks, scores, strict=True)]


def kept(mask: Tensor) -> int:
    """How many units of a mask are True, on all ranks."""
    return _count([here(mask)], mesh_of([mask]), lambda part: (part,))[0]


class Budget(Protocol):
    """A way to share one density among the score grids of a rule. At least one unit of each grid is kept."""

    def share(self, scores: list[Tensor], density: float) -> list[Tensor]:
        """Score grids (fp32, high = keep) -> boolean masks of the same shapes, split among ranks where the scores are."""
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
        return min(units, max(self.multiple, self.nearest(density, units)))

    def nearest(self, density: float, units: int) -> int:
        """The multiple that is nearest to this part of the units: none of them, it may be, or more than there are."""
        return round(density * units / self.multiple) * self.multiple


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
        if all(low <= kept(mask) <= high for low, mask, high in zip(least, masks, most, strict=True)):
            return masks
        # Every grid's best units, up to the floor, come before all others; those beyond the ceiling after all others.
        ends = [bounds(s) for s in scores]
        span = 1.0 + max(high for _, high in ends) - min(low for low, _ in ends)
        contest = [
            like(here(s) + 2.0 * span * (here(select([s], low)[0]).float() - (~here(select([s], high)[0])).float()), s)
            for s, low, high in zip(scores, least, most, strict=True)
        ]
        return select(contest, keep)


@dataclass(frozen=True)
class Sensitivity:
    """Each grid keeps what a dry pass, before training, shows that the loss needs (``finllm_prune.pruning.sensitivity``).

    The dry pass cuts by magnitude, whatever the rule's criterion: most of these know nothing before training.

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
