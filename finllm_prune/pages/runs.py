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


def runs_page(folders: Sequence[Path], place: Path) -> str:
    """A table and the Pareto fronts of the runs that were tested alike; texts of the data are not on it.

    Args:
        folders: of the runs.
        place: the folder where the page will lie; from there it links to the pages of the runs that have one.

    Raises:
        InputError: a folder holds no report, or one that is damaged.
    """
    alike: dict[tuple[str, str, str], list[Finished]] = {}
    for folder in folders:
        run = Finished.read(folder, texts=False)
        with readable(folder):
            group = (run.report["task"], run.report["data"]["source"], run.headline)
            _ = run.kept, run.smallest, run.report["latency_ratio"], run.report["passed"]
        alike.setdefault(group, []).append(run)
    runs = [run for group in alike.values() for run in group]
    with readable(runs[0].folder.parent):
        return render(
            Path(__file__).with_name("runs.html"),
            total=len(runs),
            passed=sum(bool(run.report["passed"]) for run in runs),
            groups=[_group(task, name, group, place) for (task, _, name), group in alike.items()],
            errors=ERRORS,
        )


def _group(task: str, name: str, runs: list[Finished], place: Path) -> dict[str, Any]:
    models = of_runs(runs, name)
    best = {cost: {each.name for each in unbeaten(models, cost, name)} for cost in COSTS}
    return {
        "title": f"{task}, {metric(name)}",
        "metric": name,
        "fingerprints": len({run.report["data"]["fingerprint"] for run in runs}),
        "charts": [chart for cost in COSTS if (chart := tradeoff(models, cost, name))],
        "runs": [
            {
                "number": number,
                "name": str(run.folder),
                "run": run,
                "link": _link(run.folder / PAGE, place),
                "fronts": [cost for cost in COSTS if str(number) in best[cost]],
            }
            for number, run in enumerate(runs, start=1)
        ],
    }


def _link(page: Path, place: Path) -> str | None:
    """Relative, so that both can be moved together; a name that looks like another address is none."""
    return quote(os.path.relpath(page.resolve(), place.resolve())) if page.is_file() else None
