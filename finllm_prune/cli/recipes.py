"""What is done with a recipe: run it, predict what it will give, or prune a language model in one shot."""

from pathlib import Path
from typing import Annotated

import typer

from finllm_prune.cli.hub import print_pushed
from finllm_prune.cli.screen import GATE_FAILED, console, print_rows, refuse_no_folder, save_json
from finllm_prune.errors import InputError


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values to change; a value is YAML.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the unfinished run of this recipe.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a finished output; drop an unfinished run.")] = False,
) -> None:
    """Fine-tune, prune, prove, evaluate and export a model, and write its card.

    \b
    finllm-prune run recipes/quickstart.yaml training.seed=7 output=outputs/seed7
    finllm-prune run recipes/quickstart.yaml \\
        'pruning.rules=[{target: mlp, structure: neuron, criterion: movement, sparsity: 0.5}]'

    Exit codes: 0 done, 2 bad input (nothing was trained), 3 a gate failed (everything is written, nothing pushed), 4 a proof
    failed, 5 the Hub refused (everything is written).
    """
    import datasets

    from finllm_prune.hub.push import push_output
    from finllm_prune.recipe import Recipe
    from finllm_prune.run import run as run_recipe

    datasets.disable_progress_bars()
    loaded = Recipe.load(recipe, overrides or [])
    try:
        report = run_recipe(loaded, resume=resume, overwrite=overwrite)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error
    if report is None:
        return
    print_rows(report.rows(), "dense against pruned, test split")
    if report.quality.collapsed:
        console.print(f"[bold red]The pruned model has collapsed: it {report.quality.collapse}.")
    if report.target is not None and not report.target["met"]:
        console.print(
            f"[bold red]The target was missed: {report.target['kind']} {report.target['asked']:g} asked, "
            f"{report.target['predicted']:.3f} predicted, {report.target['measured']:.3f} measured."
        )
    if not report.passed():
        console.print(f"[bold red]A gate failed; everything is written to {loaded.output}.")
        raise typer.Exit(GATE_FAILED)
    console.print(f"Done in {report.run['wall_seconds']['total']:.0f} s: {loaded.output}", soft_wrap=True)
    if loaded.hub is not None:
        print_pushed(push_output(loaded.output, loaded.hub), loaded.hub.repo_id)


def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values to change; a value is YAML.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Predict size, speed, training time and memory of a run, before it.

    \b
    finllm-prune plan recipes/sentiment/minilm_fast.yaml task.dataset=data/headlines

    It reads everything as a run does and times a few steps of each phase; the output is not touched. The latency table of this
    machine is kept in the cache, for the run.

    Exit codes: 0 done, 2 bad input, or a target out of reach.
    """
    import datasets

    from finllm_prune.plan import plan as plan_recipe
    from finllm_prune.recipe import Recipe

    refuse_no_folder(json_file)
    datasets.disable_progress_bars()
    loaded = Recipe.load(recipe, overrides or [])
    try:
        predicted = plan_recipe(loaded)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error
    print_rows(predicted.rows(), f"{recipe}: predicted, dense against pruned")
    if json_file is not None:
        save_json(predicted.to_dict(), json_file)


def oneshot(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, as recipes/oneshot/wanda_qwen3.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values to change; a value is YAML.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a finished output.")] = False,
) -> None:
    """Prune a causal language model without training, block by block, and measure and prove what was written.

    \b
    finllm-prune oneshot recipes/oneshot/wanda_qwen3.yaml model=outputs/mine pruning.oneshot=sparsegpt

    At most one block has weights at a time. `finllm-prune run` trains on from the result.

    Exit codes: 0 done, 2 bad input (nothing was pruned), 4 a proof failed.
    """
    import datasets

    from finllm_prune.oneshot import OneShotRecipe
    from finllm_prune.oneshot import oneshot as prune

    datasets.disable_progress_bars()
    loaded = OneShotRecipe.load(recipe, overrides or [])
    try:
        report = prune(loaded, overwrite=overwrite)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error
    print_rows(report.rows(), "dense against pruned, nothing trained")
    if report.quality is not None and report.quality.collapsed:
        console.print(f"[bold red]The pruned model has collapsed: it {report.quality.collapse}.")
    console.print(f"Done in {sum(report.run['wall_seconds'].values()):.0f} s: {loaded.output}", soft_wrap=True)
