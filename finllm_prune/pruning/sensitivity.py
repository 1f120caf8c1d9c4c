"""How a rule's sparsity is shared by what the loss can bear: from measured loss curves to one density per grid."""

import itertools
from collections.abc import Sequence


def allocate(
    losses: Sequence[Sequence[float]], dense: float, sizes: Sequence[int], levels: Sequence[float], sparsity: float
) -> list[float]:
    """Densities that meet ``sparsity`` over all grids together and cost the least, if the losses of single cuts add up.

    Each grid's curve is replaced by its lower convex hull; then the cheapest piece of any hull is cut first.

    Args:
        losses: for each grid, the loss with that grid alone cut to each of ``levels``.
        dense: the loss with nothing cut.
        sizes: units per grid.
        levels: sparsities, ascending, the last at least ``sparsity``.
        sparsity: of all units together.
    """
    pieces = [
        (slope / size, grid, width)
        for grid, (curve, size) in enumerate(zip(losses, sizes, strict=True))
        for slope, width in _hull([0.0, *levels], [0.0, *(max(0.0, loss - dense) for loss in curve)])
    ]
    cut = [0.0] * len(sizes)
    due = sparsity * sum(sizes)
    for _, grid, width in sorted(pieces):
        part = min(width, due / sizes[grid])
        cut[grid] += part
        due -= part * sizes[grid]
    return [1.0 - part for part in cut]


def _hull(x: list[float], y: list[float]) -> list[tuple[float, float]]:
    """The pieces (slope, width) of the lower convex hull of a curve, by ascending x."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1 and _slope(x, y, corners[-2], corners[-1]) >= _slope(x, y, corners[-1], i):
            corners.pop()
        corners.append(i)
    return [(_slope(x, y, a, b), x[b] - x[a]) for a, b in itertools.pairwise(corners)]


def _slope(x: list[float], y: list[float], a: int, b: int) -> float:
    return (y[b] - y[a]) / (x[b] - x[a])
