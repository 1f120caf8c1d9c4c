"""The page of one run: what a reviewer would rather look at than read."""

from pathlib import Path
from typing import Any

from finllm_prune.evaluation import GATES
from finllm_prune.metrics import ERRORS
from finllm_prune.pages import course, heats
from finllm_prune.pages.finished import Finished, readable
from finllm_prune.pages.rendering import render
from finllm_prune.pages.tradeoffs import of_formats, tradeoff
from finllm_prune.staging import save_text

PAGE = "report.html"


def run_page(folder: Path, *, texts: bool = True) -> str:
    """Dense against pruned, costs, and what happened on the way, from the files of a finished run alone.

    Args:
        folder: of the run.
        texts: whether texts of the data are quoted, where the run kept some that changed.

    Raises:
        InputError: there is no report, or it is damaged.
    """
    run = Finished.read(folder, texts=texts)
    with readable(folder):
        return render(Path(__file__).with_name("run.html"), run=run, **_values(run, texts))


def write_page(folder: Path, out: Path | None = None, *, texts: bool = True) -> Path:
    """Write it beside the report, or elsewhere."""
    page = out or folder / PAGE
    save_text(run_page(folder, texts=texts), page)
    return page


def _values(run: Finished, texts: bool) -> dict[str, Any]:
    report, evidence, record = run.report, run.evidence or {}, run.record
    models, found = of_formats(run, run.headline), evidence.get("confusion")
    base = Path(report["base_model"]["name"])
    return {
        "base": base.name if base.is_absolute() else str(base),
        "collapsed": [
            name for name, quality in {"pruned": report, **report["exported"]}.items() if quality["collapsed"]
        ],
        "unit": report["unit"],
        "confidence": f"{100 - 200 * evidence['alpha']:g} %" if evidence else "",
        "retention": {name: report[f"{name}_retention"] for name in run.metrics},
        "least": GATES,
        "errors": ERRORS,
        "tax": evidence.get("tax") or _classes(report["per_class"]),
        "confusion": heats.confusion(found) if found else None,
        "tradeoffs": [chart for cost in ("time", "size") if (chart := tradeoff(models, cost, run.headline))],
        "density": heats.density(report["layers"]),
        "course": course.training(report["history"]) + ([] if record is None else [course.churn(record)]),
        "scores": [] if record is None else course.scores(record),
        "missing": _missing(run, texts),
    }


def _classes(per_class: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each class pays, without intervals."""
    rows = [
        {"label": label, **each, "difference": each["pruned"] - each["dense"], "interval": None}
        for label, each in per_class.items()
    ]
    return sorted(rows, key=lambda row: float(row["difference"]))


def _missing(run: Finished, texts: bool) -> list[str]:
    """What a reader might look for in vain, and why."""
    said = []
    if not run.evidence:
        said.append(
            "Not measured by this run: the test against a margin, calibration, confusion, slices, changed texts."
        )
    elif run.evidence["calibration"] is None:
        said.append("Calibration and confusion are of classes, which this task has not.")
    elif run.evidence["confusion"] is None:
        said.append("Confusion is of single classes, which this task has not.")
    if run.record is None:
        said.append("Not recorded by this run: masks and scores over steps.")
    if run.flips is None:
        said.append("Texts whose answers changed are not told here." if texts else "Texts were left out as asked.")
    return said
