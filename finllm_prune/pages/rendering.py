"""One HTML file that asks nothing of the network and runs no script: for light and dark, desk and phone."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from finllm_prune.evaluation.non_inferiority import p_value, points
from finllm_prune.pages import wording

_HOME = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """A page on ``base.html``, with the ``parts.html`` that pages share; all values are escaped."""
    return _environment(template.parent).get_template(template.name).render(**values)


@cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _HOME]), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "points": points,
        "p": p_value,
        "signed": wording.signed,
        "change": wording.change,
        "amount": wording.amount,
        "in_points": wording.in_points,
        "percent": wording.percent,
        "metric": wording.metric,
        "plural": wording.plural,
        "three": lambda value: f"{value:.3f}",
        "two": lambda value: f"{value:.2f}",
        "megabytes": lambda value: f"{value / 1e6:.1f}",
        "count": lambda value: f"{value:,}",
    }
    return environment
