"""A sweep, top to bottom: check all of it, train the shared dense model, run what is missing, compare, pick."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from finllm_prune.errors import InputError, warned
from finllm_prune.evaluation import refuse_out_of_reach
from finllm_prune.pages import PAGE, compare_runs
from finllm_prune.prepare import read
from finllm_prune.recipe import Recipe
from finllm_prune.staging import publish, save_text
from finllm_prune.sweep.devices import Device, find_devices, seen_by
from finllm_prune.sweep.grid import TEACHER, Cell, Grid, cells_of, teacher_of
from finllm_prune.sweep.plot import draw_pareto
from finllm_prune.sweep.results import Result, Results
from finllm_prune.sweep.workers import Job, Tell, held, last_line, work
from finllm_prune.workfolder import changed_keys

RESULTS, PICKED = "sweep.json", "picked"
_COMMAND = "from finllm_prune.cli import main; main()"


@dataclass(frozen=True)
class Sweep:
    """What is to be run, all of it found possible.

    Args:
        output: the folder of all cells.
        cells: all of them.
        missing: recipes that are not finished, by name; that of the shared dense model first, where there is one to train.
        devices: where they run.
        overwrite: what lies there goes first.
        pick: the smallest model that passes is copied to ``picked``.
    """

    output: Path
    cells: list[Cell]
    missing: dict[str, Recipe]
    devices: list[Device]
    overwrite: bool
    pick: bool


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        results: of all cells that have one.
        picked: the cell that was copied to ``picked``; None where none passed, or none was asked for.
    """

    results: Results
    picked: Result | None


def plan_sweep(
    recipe: Recipe,
    grid: Grid,
    devices: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    pick: bool = False,
) -> Sweep:
    """Read and check everything; nothing is written.

    Args:
        devices: as ``find_devices`` takes them.
        resume: finished cells stay, and unfinished ones go on.
        overwrite: what lies in the output is dropped.

    Raises:
        InputError: one sentence; of a cell, with its name.
    """
    if pick and not recipe.gates:
        raise InputError("--pick: the recipe has no gates that a model could pass; add some, as gates.agreement=0.9")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("sweep: it starts its runs itself, one on each of --devices; start it without a launcher")
    found, cells, teacher = find_devices(devices), cells_of(recipe, grid), teacher_of(recipe)
    wanted = ({TEACHER: teacher} if teacher is not None else {}) | {cell.name: cell.recipe for cell in cells}
    _check_output(recipe.output, resume, overwrite)
    missing = {name: each for name, each in wanted.items() if not (resume and _is_finished(name, each))}
    if missing.keys() == {TEACHER}:  # nobody needs it any more
        missing = {}
    if missing:
        with seen_by(found[0]):
            _check_cells(cells, recipe.dense.checkpoint)
    return Sweep(recipe.output, cells, missing, found, overwrite, pick)


def run_sweep(sweep: Sweep, tell: Tell = lambda name, code: None) -> Outcome:
    """Run what is missing, each cell in a process of its own, and write what all of them come to.

    A cell that fails stops no other. ``sweep.json`` is there from the beginning and tells a sweep's folder from others.

    Args:
        tell: as of ``work``.

    Raises:
        InputError: another sweep works in the folder.
        SystemExit: a signal told to stop; the same sweep goes on with ``resume``.
    """
    sweep.output.mkdir(parents=True, exist_ok=True)
    with held(sweep.output) as lock:
        if sweep.overwrite:
            _clear(sweep.output)
        if not (sweep.output / RESULTS).exists():
            save_text("{}\n", sweep.output / RESULTS)
        jobs = [_job(name, recipe) for name, recipe in sweep.missing.items()]
        failed: dict[str, str] = {}
        for stage in ([job for job in jobs if job.name == TEACHER], [job for job in jobs if job.name != TEACHER]):
            codes = {} if failed else work(stage, sweep.devices, lock, tell)
            failed |= {
                job.name: f"exit code {codes[job.name]}, {last_line(job.log)}" if codes else "there is no dense model"
                for job in stage
                if not _stands(sweep.missing[job.name])
            }
        results = Results.of(sweep.cells, failed)
        write_results(results, sweep.output)
        return Outcome(results, _pick(results, sweep.output) if sweep.pick else None)


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Nothing is replaced unless that is asked for, and nothing but a sweep is replaced or gone on with."""
    if any(parent.is_file() for parent in (output.absolute(), *output.absolute().parents)):
        raise InputError(f"output: {output} is a file or lies below one; name a folder that can be made")
    is_sweep, exists = (output / RESULTS).is_file(), output.is_dir() and any(output.iterdir())
    if exists and not is_sweep:
        raise InputError(
            f"output: {output} exists and holds no sweep, so it is left alone; set another, as output=outputs/sweep"
        )
    if resume and not is_sweep:
        raise InputError(f"--resume: there is no sweep in {output}; start it without --resume")
    if is_sweep and not resume and not overwrite:
        raise InputError(
            f"output: a sweep lies in {output}; use --resume to go on with it (finished cells stay), or --overwrite to drop it"
        )


def _is_finished(name: str, recipe: Recipe) -> bool:
    """Whether its output is there; what is there, finished or not, must be of the same recipe."""
    for folder in (recipe.output, _partial(recipe)):
        if (folder / "recipe.yaml").is_file() and (changed := changed_keys(recipe, folder)):
            raise InputError(
                f"--resume: {name} was started with another recipe (it differs in {', '.join(changed)}); resume with that "
                "one, start the sweep afresh with --overwrite, or set another output"
            )
    return _stands(recipe)


def _stands(recipe: Recipe) -> bool:
    """A run puts its recipe there with all the rest, or nothing."""
    return (recipe.output / "recipe.yaml").is_file()


def _check_cells(cells: list[Cell], checkpoint: str | None) -> None:
    """As a run would: data and model once, for only the numbers differ; each recipe has been parsed, each target is priced."""
    first = cells[0].recipe
    name = cells[0].name
    try:
        ready = read(dataclasses.replace(first, dense=dataclasses.replace(first.dense, checkpoint=checkpoint)))
        for cell in cells:
            name = cell.name
            if (target := cell.recipe.pruning.target) is not None and ready.costs is not None:
                refuse_out_of_reach(target, ready.costs)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _job(name: str, recipe: Recipe) -> Job:
    """A run of its own, of a recipe that nobody changes meanwhile."""
    file = recipe.output.with_name(f"{name}.yaml")
    save_text(yaml.safe_dump(recipe.resolved, sort_keys=False), file)
    begun = (_partial(recipe) / "recipe.yaml").is_file()
    what = ["dense" if name == TEACHER else "run", str(file), "--resume" if begun else "--overwrite"]
    return Job(name, [sys.executable, "-c", _COMMAND, *what], file.with_suffix(".log"))


def _partial(recipe: Recipe) -> Path:
    return recipe.output.with_name(f"{recipe.output.name}.partial")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_results(results: Results, output: Path) -> None:
    """All that tells of the cells together."""
    save_text(f"{json.dumps(results.to_dict(), indent=2)}\n", output / RESULTS)
    if results.settings:
        with warned("Plot and page of the sweep", "write them with the same command and --resume"):
            draw_pareto(results, output / "pareto.png")
            compare_runs([output / result.cell for each in results.settings for result in each.results], output / PAGE)


def _pick(results: Results, output: Path) -> Result | None:
    """A whole copy, that can be proved and pushed like the cell; what an earlier choice left goes."""
    best = results.smallest()
    if best is None:
        shutil.rmtree(output / PICKED, ignore_errors=True)
        return None
    partial = output / f"{PICKED}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(output / best.cell, partial)
    publish(partial, output / PICKED)
    return best
