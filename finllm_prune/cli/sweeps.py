"""What is done with a recipe more than once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from finllm_prune.cli.screen import GATE_FAILED, console
from finllm_prune.errors import InputError

CELL_FAILED = 1
_ENDED = {0: "done", GATE_FAILED: "done, a gate failed", 128 + signal.SIGTERM: "saved and stopped"}


class SeveralValues(TyperCommand):
    """An option that can be given again takes several values at once, as ``--seeds 42 43``; a KEY=VALUE is none of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option before each of its values."""
        several = {
            option for parameter in self.params if getattr(parameter, "multiple", False) for option in parameter.opts
        }
        spread: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("--") or "=" in arg:
                option = arg if arg in several else None
            elif option is not None and spread[-1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; its output is the folder of the sweep.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values to change in all cells.")
    ] = None,
    sparsities: Annotated[list[float] | None, typer.Option(help="Each in the place of every rule's sparsity.")] = None,
    targets: Annotated[
        list[float] | None, typer.Option(help="Or each in the place of the part in pruning.target.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Of the training; by default the recipe's.")] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            help="cuda:0 cuda:1, or cpu cpu: one cell at a time on each. By default on the device that a single run takes."
        ),
    ] = None,
    pick: Annotated[
        bool, typer.Option("--pick", help="Copy the smallest model that passes the gates to picked/.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with a sweep; finished cells stay.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Drop the sweep that lies in the output.")] = False,
) -> None:
    """Run a recipe at several sparsities or targets and seeds, and compare what comes of it.

    \b
    finllm-prune sweep recipes/quickstart.yaml output=outputs/sweep --sparsities 0.5 0.75 0.9 --seeds 42 43 --pick
    finllm-prune sweep recipes/sentiment/minilm_fast.yaml output=outputs/fast --targets 0.5 0.33 0.2 --devices cuda:0 cuda:1

    One dense model is trained (by the recipe's own seed) and shared; each cell is a run, in OUTPUT/sparsity-0.75_seed-42 with
    its log beside it. Stop it at any time: the runs save first, and the same command with --resume goes on. At the end: a
    table, OUTPUT/sweep.json, OUTPUT/pareto.png and the page OUTPUT/report.html.

    --pick takes the setting of fewest bytes (of its smallest exact format; then of fewest weights) of which all seeds passed
    their gates, and of it the first seed. With several --devices the CPU latency of cells is measured while others run.

    Exit codes: 0 done, 1 a cell failed (the others are written), 2 bad input (nothing was trained), 3 no model passed the
    gates for --pick. A gate that fails is a result.
    """
    import datasets

    from finllm_prune.recipe import Recipe
    from finllm_prune.sweep import Grid, plan_sweep, run_sweep

    datasets.disable_progress_bars()
    grid = Grid(sparsities or [], targets or [], seeds or [])
    loaded = Recipe.load(recipe, overrides or [])
    try:
        planned = plan_sweep(loaded, grid, devices or [], resume=resume, overwrite=overwrite, pick=pick)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error
    with _bar(list(planned.missing)) as tell:
        outcome = run_sweep(planned, tell)
    heads, rows = outcome.results.table()
    table = Table(box=box.SIMPLE, title=f"{recipe}: {outcome.results.title()}")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for name, reason in outcome.results.failed.items():
        console.print(f"[bold red]{name} failed: {escape(reason)}", soft_wrap=True, highlight=False)
    console.print(f"Written: {loaded.output}", soft_wrap=True, highlight=False)
    if outcome.picked is not None:
        console.print(f"Picked: {outcome.picked.cell}, now in {loaded.output}/picked", soft_wrap=True, highlight=False)
    elif pick:
        console.print("[bold red]No model passed the gates with all seeds; nothing was picked.")
    if outcome.results.failed or (pick and outcome.picked is None):
        raise typer.Exit(CELL_FAILED if outcome.results.failed else GATE_FAILED)


def dense(recipe: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Train the dense model of a recipe alone: what a sweep shares among its cells."""
    import datasets

    from finllm_prune.recipe import Recipe
    from finllm_prune.sweep import train_teacher

    datasets.disable_progress_bars()
    train_teacher(Recipe.load(recipe), resume=resume, overwrite=overwrite)


@contextmanager
def _bar(jobs: list[str]) -> Iterator[Callable[[str, int | None], None]]:
    """A bar over jobs that names those under way, and a line for each that has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        running: list[str] = []

        def tell(name: str, code: int | None) -> None:
            if code is None:
                running.append(name)
            else:
                running.remove(name)
                progress.advance(task)
                console.print(f"{name}: {_ENDED.get(code, f'failed with exit code {code}')}", highlight=False)
            progress.update(task, description=", ".join(running))

        try:
            yield tell
        except SystemExit:
            console.print("Stopped; the same command with --resume goes on.", highlight=False)
            raise
