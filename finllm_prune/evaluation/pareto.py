"""Which of many models nothing else beats in both cost and quality."""

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats, cheapest first.

    One point beats another where it costs no more and is no worse, and is better in one of the two; equal points do not
    beat each other.

    Args:
        points: (cost, quality) each: less cost and more quality are better. NaN in either is not known, hence on no front.

    Returns:
        Their indices, by cost, then in the order given.
    """
    known = [place for place, point in enumerate(points) if not any(map(math.isnan, point))]
    best, out = (math.inf, -math.inf), []
    for place in sorted(known, key=lambda place: (points[place][0], -points[place][1])):
        if points[place][1] > best[1] or points[place] == best:
            best = points[place]
            out.append(place)
    return out
