"""A target in milliseconds, FLOPs or bytes: how many heads and neurons stay in which block, chosen over all of them at once.

The idea is ZipLM's (Kurtic et al. 2023, https://arxiv.org/abs/2302.04089): what counts is the loss per measured millisecond.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_TRIES = 5
_NEAR = 0.002


@dataclass(frozen=True)
class Costs:
    """What the widths of a model cost, as parts of what the dense model costs.

    Args:
        tables: group name -> float64, shape (units + 1,), never falling: entry k is the cost of the group with k units kept.
        rest: what no rule can cut, as embeddings and head.
        limit: what all of it together may cost at the end.
        surface: where the costs of two groups do not simply add up, as milliseconds do not: float64, entry (j, k) is the
            cost of a model all of whose pairs keep j and k units. The tables are slices of it then.
        pairs: the names of the two groups of each block.
    """

    tables: Mapping[str, Tensor]
    rest: float
    limit: float
    surface: Tensor | None = None
    pairs: tuple[tuple[str, str], ...] = ()

    def total(self, kept: Mapping[str, int]) -> float:
        """The cost of a model with so many units in each group."""
        if self.surface is not None:
            blocks = [float(self.surface[kept[first], kept[second]]) for first, second in self.pairs]
            return sum(blocks) / len(blocks)
        return self.rest + sum(float(table[kept[name]]) for name, table in self.tables.items())

    @property
    def start(self) -> float:
        """Before anything is cut."""
        return self.total({name: len(table) - 1 for name, table in self.tables.items()})

    @property
    def lowest(self) -> float:
        """With one unit in each group; one always stays."""
        return self.total(dict.fromkeys(self.tables, 1))

    def due(self, fraction: float) -> float:
        """What the model may cost when that fraction of the way has been gone."""
        return self.start - fraction * (self.start - self.limit)

    def share(self, worth: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        """Masks (on the CPU) of all groups together, at most as dear as is due; see ``spread``.

        Where the tables are slices of a surface, the choice is made again with as much more or less money as it was off,
        and may end up to 0.002 of the dense cost above what is due.
        """
        due = self.due(fraction)
        money, tables = due - self.rest, [self.tables[name] for name in worth]
        tried: list[tuple[bool, float, int, dict[str, Tensor]]] = []
        for _ in range(_TRIES):
            masks = dict(zip(worth, spread(list(worth.values()), tables, money), strict=True))
            over = self.total({name: int(mask.sum()) for name, mask in masks.items()}) - due
            tried.append((over > _NEAR, abs(over), len(tried), masks))
            if self.surface is None or abs(over) <= _NEAR:
                break
            money -= over
        return min(tried, key=lambda choice: choice[:3])[3]

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: times that are measured again would be others."""
        tables = {f"{name}/costs": table for name, table in self.tables.items()}
        tables |= {} if self.surface is None else {"surface": self.surface}
        return tables | {"costs": torch.tensor([self.rest, self.limit], dtype=torch.float64)}

    def restored(self, state: Mapping[str, Tensor]) -> "Costs":
        """The costs that a checkpoint was saved with."""
        rest, limit = state["costs"].tolist()
        tables = {name: state[f"{name}/costs"].cpu() for name in self.tables}
        return Costs(tables, rest, limit, state["surface"].cpu() if "surface" in state else None, self.pairs)


def spread(worth: Sequence[Tensor], tables: Sequence[Tensor], limit: float) -> list[Tensor]:
    """The masks (on the CPU) that keep the most worth among those that cost at most ``limit``, nearly.

    Within a group the best units stay, so that only widths are open. Each group's curve of worth over cost is replaced by
    its upper convex hull, and the pieces of all hulls are bought by worth per cost, as far as the money goes; no single unit
    could be bought with what is left. Equal widths, filled up in the same way, are taken where they are worth more.

    Args:
        worth: a 1-dim grid per group, not negative: how much the loss rises without a unit; ties go to the lower index.
        tables: a ``Costs.tables`` entry per group.
        limit: one unit of each group stays, whatever it costs.
    """
    values = [grid.detach().double().cpu() for grid in worth]
    orders = [grid.argsort(descending=True, stable=True) for grid in values]
    # Plain numbers: the walk over all units is a hundred times slower on tensors.
    gains = [[0.0, *grid[order].cumsum(0).tolist()] for grid, order in zip(values, orders, strict=True)]
    prices = [table.tolist() for table in tables]
    pieces = sorted(
        (-slope, group, first, last)
        for group, (gain, price) in enumerate(zip(gains, prices, strict=True))
        for slope, first, last in _hull(price, gain)
    )
    starts = ([1] * len(prices), equal_widths(tables, limit))
    kept = max(
        (_grow(start, pieces, prices, limit) for start in starts),
        key=lambda widths: sum(gain[k] for gain, k in zip(gains, widths, strict=True)),
    )
    masks = []
    for grid, order, k in zip(worth, orders, kept, strict=True):
        mask = torch.zeros(grid.shape, dtype=torch.bool)
        mask[order[:k]] = True
        masks.append(mask)
    return masks


def equal_widths(tables: Sequence[Tensor], limit: float) -> list[int]:
    """The largest part of its units, the same in each group, that costs at most ``limit``: how many stay in each."""
    prices = [table.tolist() for table in tables]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = _cost(prices, _widths(prices, middle)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    whole = _widths(prices, 1.0)
    return whole if _cost(prices, whole) <= limit else _widths(prices, low)


def _widths(prices: Sequence[list[float]], part: float) -> list[int]:
    return [max(1, int(part * (len(price) - 1))) for price in prices]


def _cost(prices: Sequence[list[float]], kept: Sequence[int]) -> float:
    return sum(price[k] for price, k in zip(prices, kept, strict=True))


def _hull(price: list[float], gain: list[float]) -> list[tuple[float, int, int]]:
    """The pieces (worth per cost, from width, to width) of the upper convex hull, steepest first, from width 1 on."""
    corners: list[int] = []
    for k in range(1, len(price)):
        while len(corners) > 1 and _slope(price, gain, corners[-1], k) >= _slope(price, gain, *corners[-2:]):
            corners.pop()
        corners.append(k)
    return [(_slope(price, gain, a, b), a, b) for a, b in pairwise(corners)]


def _slope(price: list[float], gain: list[float], a: int, b: int) -> float:
    return (gain[b] - gain[a]) / (price[b] - price[a]) if price[b] > price[a] else float("inf")


def _grow(
    kept: Sequence[int], pieces: list[tuple[float, int, int, int]], prices: Sequence[list[float]], limit: float
) -> list[int]:
    """Widths after the pieces were bought in their order, each as far as the money goes."""
    kept = list(kept)
    money = limit - _cost(prices, kept)
    for _, group, first, last in pieces:
        price, now = prices[group], kept[group]
        if first <= now < last:
            kept[group] = bisect_right(price, price[now] + money, now + 1, last + 1) - 1
            money -= price[kept[group]] - price[now]
    return kept
