"""Charts as places on a canvas: a template draws them, so that they take the page's colours and need no script.

matplotlib's SVG takes a quarter of a second each, brings its own colours along, and has one size for desk and phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

_MOST = 400  # points of a line; of more every so manieth is drawn
_LETTER = 5.6  # the width of a letter that is 10 high
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, in the unit that ``label`` names; where less is better, ``low`` may be the greater one."""

    label: str
    low: float
    high: float
    ticks: list[float]

    def part(self, value: float) -> float:
        """0 to 1 along the axis."""
        return (value - self.low) / (self.high - self.low)


def axis(label: str, values: Iterable[float], ticks: int = 5, *, zero: bool = False, turned: bool = False) -> Axis:
    """An axis that holds all values.

    Args:
        label: what they are, with the unit.
        values: of the points.
        ticks: about this many.
        zero: whether it begins at 0, where no value lies below.
        turned: whether the least value is at its far end.
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    room = 0.06 * (max(known) - min(known)) or 0.05 * abs(known[0]) or 1.0
    low, high = 0.0 if zero and min(known) >= 0 else min(known) - room, max(known) + room
    inside = [round(tick, 12) for tick in MaxNLocator(ticks).tick_values(low, high) if low <= tick <= high]
    return Axis(label, high if turned else low, low if turned else high, inside)


@dataclass(frozen=True)
class Line:
    """``kind`` is its class in the style sheet; without a ``name`` it has no place in the key."""

    points: Sequence[Point]
    kind: str
    name: str = ""


@dataclass(frozen=True)
class Band:
    """``points``: x, and where the band begins and ends there."""

    points: Sequence[tuple[float, float, float]]
    kind: str


@dataclass(frozen=True)
class Mark:
    """A dot with a name beside it, and the interval of its y."""

    x: float
    y: float
    kind: str
    name: str
    reach: Sequence[float] | None = None


@dataclass(frozen=True)
class Label:
    """A text on the canvas; ``anchor``: which of its ends lies at ``x``."""

    x: float
    y: float
    anchor: str
    text: str

    def meets(self, other: "Label") -> bool:
        """Whether one would be written over the other."""
        (left, right), (their_left, their_right) = self._span(), other._span()
        return left < their_right and their_left < right and abs(self.y - other.y) < 10

    def _span(self) -> Point:
        width = _LETTER * len(self.text)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, left + width


@dataclass(frozen=True)
class Chart:
    """What there is to see (``title``, a sentence), and what is drawn on ``width`` by ``height``."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()
    width: int = 300
    height: int = 200

    left, top = 38, 18

    @property
    def right(self) -> int:
        return self.width - 6

    @property
    def bottom(self) -> int:
        return self.height - 28

    def across(self, value: float) -> float:
        """The place of an x."""
        return round(self.left + self.x.part(value) * (self.right - self.left), 1)

    def down(self, value: float) -> float:
        """The place of a y."""
        return round(self.bottom - self.y.part(value) * (self.bottom - self.top), 1)

    def along(self, line: Line) -> str:
        """The points of a line, as SVG writes them."""
        return self._path([point for point in line.points if all(map(math.isfinite, point))])

    def around(self, band: Band) -> str:
        """The outline of a band."""
        known = [point for point in band.points if all(map(math.isfinite, point))]
        return (
            self._path([(x, low) for x, low, _ in known]) + " " + self._path([(x, up) for x, _, up in reversed(known)])
        )

    def _path(self, points: Sequence[Point]) -> str:
        every = -(-len(points) // _MOST) or 1
        drawn = [*points[:-1:every], *points[-1:]]
        return " ".join(f"{self.across(x)},{self.down(y)}" for x, y in drawn)

    def key(self) -> list[Line]:
        """The lines that a reader has to tell from each other."""
        return [line for line in self.lines if line.name]

    def labels(self) -> list[Label]:
        """The names of the marks, each where it meets no other and no mark, as far as there is such a place."""
        dots = [Label(self.across(mark.x), self.down(mark.y) + 4, "middle", "o") for mark in self.marks]
        out: list[Label] = []
        for mark, dot in zip(self.marks, dots, strict=True):
            places = [(8, 0, "start"), (-8, 0, "end"), (0, -12, "middle"), (0, 12, "middle")]
            places += [(8, 11, "start"), (-8, 11, "end"), (8, -11, "start"), (-8, -11, "end")]
            tried = [Label(dot.x + x, dot.y + y, anchor, mark.name) for x, y, anchor in places]
            within = [label for label in tried if label._span()[0] >= 0 and label._span()[1] <= self.width]
            others = [other for other in [*out, *dots] if other is not dot]
            free = (label for label in within if not any(label.meets(other) for other in others))
            out.append(next(free, (within or tried)[0]))
        return out
