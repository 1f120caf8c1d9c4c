"""Figures in words, as tables and pages write them."""

from finllm_prune.evaluation.report import TITLES
from finllm_prune.metrics import ERRORS


def signed(value: float) -> str:
    """A difference in points, with its sign."""
    return _minus(f"{100 * value:+.1f}")


def change(value: float, metric: str) -> str:
    """A difference of a metric: in points, and of an error in the metric's own unit."""
    return _minus(f"{value:+.3f}") if metric in ERRORS else signed(value)


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
