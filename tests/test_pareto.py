"""The Pareto front: exactly the points that no other point beats."""

import math

from hypothesis import given
from hypothesis import strategies as st

from finllm_prune.evaluation.pareto import front

_GRID = st.integers(0, 5).map(float)  # few values, so that points tie


@given(st.lists(st.tuples(_GRID, _GRID), max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(cost <= point[0] and quality >= point[1] and (cost, quality) != point for cost, quality in points)

    found = front(points)
    assert sorted(found) == [place for place, point in enumerate(points) if not beaten(point)]
    assert found == sorted(found, key=lambda place: (points[place][0], place))


def test_what_was_not_measured_is_on_no_front() -> None:
    assert front([(1.0, math.nan), (math.nan, 1.0), (2.0, 0.5)]) == [2]
    assert front([]) == []
