"""What is asked of a saved model: how good it is, on which data, and how sparse."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from finllm_prune.cli.screen import GATE_FAILED, console, print_rows, refuse_no_folder, save_json
from finllm_prune.errors import InputError


def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model or Hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="With --suite: values of it to change.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="sentiment, filings, reranking or instructions; by default the recipe's, or sentiment."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="builtin, a folder of splits, or a Hub id; by default the recipe's, or builtin.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Says how texts are prepared (pairs, masks, windows); by default the recipe.yaml beside the model."
        ),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens; longer texts are cut. By default as the task does it.")
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="A YAML file of sets, as recipes/suites/quickstart.yaml.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="With --suite: write a page here.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="With --suite: a folder for answers, to go on after a kill.")
    ] = None,
    show_texts: Annotated[
        bool, typer.Option(help="With --suite: quote up to 25 lost or won texts a set in the files.")
    ] = False,
) -> None:
    """Measure a model on a test split; with --baseline, hold it against the dense one; with --suite, on many sets.

    \b
    finllm-prune evaluate outputs/quickstart/compact --baseline outputs/quickstart/dense \\
        --suite recipes/suites/quickstart.yaml --html quickstart.html

    A suite asks first whether the pruned model is worse by more than a margin, and shows what pruning costs where: classes,
    slices, calibration, texts that are changed a little, and what it saves in time.

    Exit codes: 0 done, 2 bad input, 3 a gate of the suite failed (everything is written).
    """
    import datasets

    refuse_no_folder(json_file)
    refuse_no_folder(html_file, "--html")
    datasets.disable_progress_bars()
    if suite is not None:
        if baseline is None:
            raise InputError("--suite: name the dense model to compare with by --baseline")
        if any(option is not None for option in (task, dataset, max_length, recipe)):
            raise InputError(
                "--suite: its sets have their own tasks; remove --task, --dataset, --recipe and --max-length"
            )
        _evaluate_suite(suite, overrides or [], model, baseline, json_file, html_file, keep, show_texts)
        return
    if overrides or html_file or keep or show_texts:
        raise InputError("KEY=VALUE, --html, --keep and --show-texts go with --suite; add it or remove them")

    from finllm_prune.saved import evaluate_saved

    figures, rows = evaluate_saved(model, task, dataset, baseline, max_length, recipe)
    print_rows(rows, f"{model} on {dataset or 'the test split'}")
    if json_file is not None:
        save_json(figures, json_file)


def _evaluate_suite(
    path: Path, overrides: list[str], model: str, baseline: str,
    json_file: Path | None, html_file: Path | None, keep: Path | None, show_texts: bool,
) -> None:  # fmt: skip
    from finllm_prune.staging import save_text
    from finllm_prune.suite import Suite, evaluate_suite, page

    loaded = Suite.load(path, overrides)
    try:
        report = evaluate_suite(loaded, model, baseline, keep, show_texts)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    heads, rows = report.table()
    table = Table(*heads, title=f"{model} against {baseline}")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    if json_file is not None:
        save_json(report.to_dict(), json_file)
    if html_file is not None:
        save_text(page(report), html_file)
    for file in (json_file, html_file):
        if file is not None:
            console.print(f"Written: {file}", soft_wrap=True, highlight=False)
    for name, reason in report.left_out.items():
        console.print(escape(f"{name} was left out: {reason}."), soft_wrap=True, highlight=False)
    console.print(f"[bold]{escape(report.headline())}.", soft_wrap=True, highlight=False)
    for each in report.sets:
        if each.quality.collapsed:
            console.print(f"[bold red]{escape(each.name)}: the pruned model {each.quality.collapse}.", soft_wrap=True)
    if not report.passed():
        failed = [f"{row['gate']} on {row['set']}" for row in report.gate_rows() if not row["passed"]]
        console.print(
            f"[bold red]A gate failed: {escape(', '.join(failed) or 'no set has its value')}.", soft_wrap=True
        )
        raise typer.Exit(GATE_FAILED)


def pull_and_compare(
    model: Annotated[str, typer.Argument(help="The pruned model: a saved one or a Hub id.")],
    baseline: Annotated[str, typer.Argument(help="The dense model to compare with: a saved one or a Hub id.")],
    data: Annotated[Path, typer.Option(help="Your own .csv (or .jsonl, .parquet), with or without labels.")],
    text: Annotated[str, typer.Option(help="The column of the text.")] = "text",
    label: Annotated[str, typer.Option(help="The column of the label, where there is one.")] = "label",
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens; longer texts are cut. By default those of the recipe beside MODEL, or 128."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    flips: Annotated[Path | None, typer.Option(help="Write the rows with another prediction here, as .csv.")] = None,
) -> None:
    """Hold a pruned model against the dense one on your own texts: agreement and flips; with labels, metrics too.

    \b
    finllm-prune pull-and-compare org/name org/name-dense --data mine.csv --flips flips.csv

    Exit codes: 0 done, 2 bad input.
    """
    from finllm_prune.comparison import compare_on

    refuse_no_folder(json_file)
    refuse_no_folder(flips, "--flips")
    compared = compare_on(model, baseline, data, text, label, max_length)
    print_rows(compared.rows, f"{model} against {baseline} on {data.name}")
    if json_file is not None:
        save_json(compared.figures, json_file)
    if flips is not None:
        compared.write_flips(flips)


def inspect(model: Annotated[str, typer.Argument(help="A saved model or Hub id.")]) -> None:
    """Show the shape and the sparsity of every prunable layer.

    \b
    finllm-prune inspect outputs/quickstart/masked

    Exit codes: 0 done, 2 bad input.
    """
    from finllm_prune.saved import inspect_saved

    table = Table("layer", "shape", "sparsity", title=model)
    for name, shape, sparsity in inspect_saved(model):
        table.add_row(name, shape, sparsity)
    console.print(table)
