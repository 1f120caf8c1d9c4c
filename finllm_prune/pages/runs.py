"""Many runs on one page: which of them is better at no greater cost."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finllm_prune.metrics import ERRORS
from finllm_prune.pages.finished import Finished, readable
from finllm_prune.pages.rendering import render
from finllm_prune.pages.run import PAGE
from finllm_prune.pages.tradeoffs import COSTS, of_runs, tradeoff, unbeaten
from finllm_prune.pages.wording import metric
from finllm_prune.staging import save_text


def compare_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write a table and the Pareto fronts of the runs that were tested alike; texts of the data are not told.

    Args:
        folders: of the runs.
        out: the page; from its folder it links to the pages of the runs that have one.

    Raises:
        InputError: a folder holds no report, or one that is damaged.
    """
    alike: dict[tuple[str, ...], list[Finished]] = {}
    for folder in folders:
        run = Finished.read(folder, texts=False)
        with readable(folder):
            group = (run.report["task"], run.report["data"]["source"], *run.metrics)
            _ = (
                run.headline,
                run.kept,
                run.smallest,
                run.report["latency_ratio"],
            )  # what is damaged is found, and named, here
        alike.setdefault(group, []).append(run)
    runs = [run for group in alike.values() for run in group]
    with readable(out):
        page = render(
            Path(__file__).with_name("runs.html"),
            total=len(runs),
            passed=sum(bool(run.report["passed"]) for run in runs),
            groups=[_group(group, out.parent) for group in alike.values()],
            errors=ERRORS,
        )
    save_text(page, out)
    return out


def _group(runs: list[Finished], place: Path) -> dict[str, Any]:
    name = runs[0].headline
    models = of_runs(runs, name)
    names = _short([run.folder for run in runs])
    best = {cost: {each.name for each in unbeaten(models, cost, name)} for cost in COSTS}
    return {
        "title": f"{runs[0].report['task']}, {metric(name)}",
        "metric": name,
        "fingerprints": len({run.report["data"]["fingerprint"] for run in runs}),
        "charts": [chart for cost in COSTS if (chart := tradeoff(models, cost, name))],
        "runs": [
            {
                "number": number,
                "name": names[run.folder],
                "run": run,
                "link": _link(run.folder / PAGE, place),
                "fronts": [cost for cost in COSTS if str(number) in best[cost]],
            }
            for number, run in enumerate(runs, start=1)
        ],
    }


def _short(folders: Sequence[Path]) -> dict[Path, str]:
    """Their names, with as much of the way as tells them apart."""
    whole = [folder.resolve() for folder in folders]
    common = os.path.commonpath([folder.parent for folder in whole])
    return {folder: os.path.relpath(path, common) for folder, path in zip(folders, whole, strict=True)}


def _link(page: Path, place: Path) -> str | None:
    """Relative, so that both can be moved together; a name that looks like another address is none."""
    return quote(os.path.relpath(page.resolve(), place.resolve())) if page.is_file() else None
