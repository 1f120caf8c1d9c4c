"""Metrics: one `evaluate` module a file, found by its name, with a plain function of that name inside."""

import importlib
from collections.abc import Callable
from typing import Any

from finllm_prune.errors import InputError

Metric = Callable[[Any, Any], float]
ERRORS = ("mse", "mae", "perplexity")  # the less the better


def find_metric(name: str) -> Metric:
    """The plain function of a metric: (predictions, references) -> value."""
    try:
        metric: Metric = getattr(importlib.import_module(f"finllm_prune.metrics.{name}"), name)
    except (ModuleNotFoundError, AttributeError):
        raise InputError(f"unknown metric '{name}': write it as finllm_prune/metrics/{name}.py") from None
    return metric
