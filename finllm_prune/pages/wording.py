"""Figures in words, as tables and pages write them."""

from finllm_prune.evaluation.non_inferiority import points
from finllm_prune.evaluation.report import GATES, TITLES


def signed(value: float) -> str:
    """A difference in points, with its sign."""
    return _minus(f"{100 * value:+.1f}")


def change(value: float, metric: str) -> str:
    """A difference of a metric, with its sign: in points, or in the metric's own unit."""
    return signed(value) if in_points(metric) else _minus(f"{value:+.3f}")


def in_points(metric: str) -> bool:
    """Whether it is a share, or a correlation; an error or a likelihood has a unit of its own."""
    return GATES.get(metric) == "min"


def amount(value: float, metric: str) -> str:
    """A difference without its sign, with its unit."""
    return points(abs(value)) if in_points(metric) else f"{abs(value):.3g}"


def percent(part: float) -> str:
    """Of a whole, with a digit."""
    return f"{100 * part:.1f} %"


def metric(name: str) -> str:
    """A metric's name as people write it."""
    return TITLES.get(name, name)


def plural(unit: str) -> str:
    """Rows, queries."""
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def _minus(number: str) -> str:
    return number.replace("-", "−")
