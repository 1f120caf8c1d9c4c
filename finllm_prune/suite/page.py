"""The report of a suite as one HTML page that asks nothing of the network: for light and dark, desk and phone."""

from pathlib import Path

from finllm_prune.pages import render
from finllm_prune.suite.report import SuiteReport


def page(report: SuiteReport) -> str:
    """All that was measured; whatever comes from data, models and the suite is escaped."""
    ends = [end for each in report.sets for end in each.tested.interval]
    reach = max(2 * report.asked.margin, *map(abs, ends))
    return render(
        Path(__file__).with_name("page.html"),
        report=report,
        verdicts=report.verdicts(),
        corrected=report.corrected(),
        gates=report.gate_rows(),
        reach=min(reach, 0.25),
    )
