"""Pages about finished runs."""

from pathlib import Path
from typing import Annotated

import typer

from finllm_prune.cli.screen import console, refuse_no_folder


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in DIR, or here where there are several.")
    ] = None,
    texts: Annotated[bool, typer.Option(help="Quote texts whose answers changed, where the run kept them.")] = True,
) -> None:
    """Write a page about a finished run, or one that compares several: one HTML file, without scripts and requests.

    \b
    finllm-prune report outputs/quickstart
    finllm-prune report outputs/sweep/sparsity-*/ --out compared.html

    Of one run: quality, costs, what was cut and when. Of several: a table, the Pareto fronts of quality against time, size and
    kept weights, and links to the runs' own pages; runs on other data or tasks stand apart, and no text of the data is told.
    """
    from finllm_prune.pages import PAGE, compare_runs, write_page

    refuse_no_folder(out, "--out")
    alone = len(folders) == 1
    file = write_page(folders[0], out, texts=texts) if alone else compare_runs(folders, out or Path(PAGE))
    console.print(f"Written: {file}", soft_wrap=True, highlight=False)
