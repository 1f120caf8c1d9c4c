"""The report of a suite as one HTML page that asks nothing of the network: for light and dark, desk and phone."""

from pathlib import Path

import jinja2

from finllm_prune.evaluation.non_inferiority import p_value, points
from finllm_prune.suite.report import SuiteReport


def page(report: SuiteReport) -> str:
    """All that was measured; whatever comes from data, models and the suite is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "points": points,
        "p": p_value,
        "signed": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        "percent": lambda value: f"{100 * value:.1f} %",
        "three": lambda value: f"{value:.3f}",
        "count": lambda value: f"{value:,}",
    }
    ends = [end for each in report.sets for end in each.tested.interval]
    reach = max(2 * report.asked.margin, *map(abs, ends))
    return environment.get_template("page.html").render(
        report=report,
        verdicts=report.verdicts(),
        corrected=report.corrected(),
        gates=report.gate_rows(),
        reach=min(reach, 0.25),
    )
