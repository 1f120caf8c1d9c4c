"""The command line: arguments to the package; no logic."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import finllm_prune
from finllm_prune.errors import HubError, InputError, ProofError

if TYPE_CHECKING:
    from finllm_prune.export import Written
    from finllm_prune.hub.push import Pushed

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fine-tune financial language models while pruning them."
)
console = Console()
BAD_INPUT, GATE_FAILED, PROOF_FAILED, NOT_PUSHED = 2, 3, 4, 5


@app.command()
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
    _print_rows(report.rows(), "dense against pruned, test split")
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
        _print_pushed(push_output(loaded.output, loaded.hub), loaded.hub.repo_id)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Values to change; a value is YAML.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Predict size, speed, training time and memory of a run; nothing is trained to its end, and nothing written."""
    import datasets

    from finllm_prune.plan import plan as plan_recipe
    from finllm_prune.recipe import Recipe

    _refuse_no_folder(json_file)
    datasets.disable_progress_bars()
    loaded = Recipe.load(recipe, overrides or [])
    try:
        predicted = plan_recipe(loaded)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from error
    _print_rows(predicted.rows(), f"{recipe}: predicted, dense against pruned")
    if json_file is not None:
        json_file.write_text(json.dumps(predicted.to_dict(), indent=2) + "\n")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model or Hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="With --suite: values of it to change.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task; by default the recipe's, or sentiment.")] = None,
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
    show_texts: Annotated[bool, typer.Option(help="With --suite: texts of the data in the files.")] = False,
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

    _refuse_no_folder(json_file)
    _refuse_no_folder(html_file, "--html")
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
    _print_rows(rows, f"{model} on {dataset or 'the test split'}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def _evaluate_suite(
    path: Path, overrides: list[str], model: str, baseline: str,
    json_file: Path | None, html_file: Path | None, keep: Path | None, show_texts: bool,
) -> None:  # fmt: skip
    import datasets

    from finllm_prune.staging import save_text
    from finllm_prune.suite import Suite, evaluate_suite, page

    datasets.disable_progress_bars()
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
    for file, text in ((json_file, f"{json.dumps(report.to_dict(), indent=2)}\n"), (html_file, page(report))):
        if file is not None:
            save_text(text, file)
            console.print(f"Written: {file}", soft_wrap=True, highlight=False)
    for name, reason in report.left_out.items():
        console.print(escape(f"{name} was left out: {reason}."), soft_wrap=True, highlight=False)
    console.print(f"[bold]{escape(report.headline())}.", soft_wrap=True, highlight=False)
    if not report.passed():
        failed = [f"{row['gate']} on {row['set']}" for row in report.gate_rows() if not row["passed"]]
        console.print(
            f"[bold red]A gate failed: {escape(', '.join(failed) or 'no set has its value')}.", soft_wrap=True
        )
        raise typer.Exit(GATE_FAILED)


@app.command()
def inspect(model: Annotated[str, typer.Argument(help="A saved model or Hub id.")]) -> None:
    """Show the shape and the sparsity of every prunable layer."""
    from finllm_prune.saved import inspect_saved

    table = Table("layer", "shape", "sparsity", title=model)
    for name, shape, sparsity in inspect_saved(model):
        table.add_row(name, shape, sparsity)
    console.print(table)


@app.command()
def verify(
    model: Annotated[
        str,
        typer.Argument(help="A folder that finllm-prune exported, or one that holds such, as a run's; or a Hub id."),
    ],
    revision: Annotated[str | None, typer.Option(help="Of a Hub id: a branch, tag or commit.")] = None,
) -> None:
    """Prove exported checkpoints again from their files: hashes, zeros, recorded logits; one line for each.

    Files that are not named in the manifest are allowed for people only (.md, .yaml, .png, no suffix, the report): transformers
    would take a stray weight file, adapter or script for a part of the model. A Hub id is downloaded first.

    Exit codes: 0 all hold, 2 nothing was exported there, 4 the first that does not hold.
    """
    from finllm_prune.checkpoints import exported_in, proved
    from finllm_prune.checkpoints import verify as verify_folder
    from finllm_prune.hub.pull import pull

    place = pull(model, revision)
    for folder in exported_in(place):
        name = Path(model) / folder.relative_to(place)
        console.print(f"{name}: {proved(verify_folder(folder))}", soft_wrap=True)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A saved model in any whole format, or a run's output (its masked/).")],
    out: Annotated[Path, typer.Argument(help="The folder to make: each format lies in OUT/FORMAT.")],
    to: Annotated[list[str], typer.Option(metavar="FORMAT", help="A format to write; can be given again.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that holds exported checkpoints only.")] = False,
) -> None:
    """Write a finished model in other formats, each proved equal to it; whole or not at all.

    \b
    finllm-prune export outputs/quickstart exported --to compact
    finllm-prune export outputs/quickstart/masked exported --to masked --to compact --overwrite

    masked keeps zeros in place; compact leaves out what has no effect and is smaller and faster. An unknown FORMAT lists
    all there are. The source is proved first where it has a manifest; its card and recipe are carried along.

    Exit codes: 0 done, 2 bad input or a full disk (OUT is as it was), 4 a proof failed (OUT is as it was).
    """
    from finllm_prune.export import export as write

    _print_written(write(model, out, to, overwrite=overwrite), str(model))


@app.command()
def delta(
    base: Annotated[str, typer.Argument(help="The dense base: a saved model or Hub id.")],
    model: Annotated[
        Path, typer.Argument(help="What was made from it, zeros in place; or a run's output (its masked/).")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that holds exported checkpoints only.")] = False,
) -> None:
    """Write what a task changes in a dense base: bitmasks of zeros, and values where they differ.

    \b
    finllm-prune delta outputs/quickstart/dense outputs/quickstart deltas/quickstart

    Many tasks share one base in memory: finllm_prune.checkpoints.delta.apply turns it into one, remove turns it back. After
    score_movement, which keeps the base's values, a matrix takes a 32nd; after ordinary fine-tuning the values lie there too.

    Exit codes: as of export.
    """
    from finllm_prune.export import export_delta

    written, counts = export_delta(base, model, out, overwrite=overwrite)
    _print_written([written], str(model))
    console.print(", ".join(f"{count} tensors {_IN_A_DELTA[kind]}" for kind, count in counts.items()), soft_wrap=True)


_IN_A_DELTA = {"equal": "as in the base", "zeros": "with new zeros alone", "values": "with other values"}


@app.command()
def trim(
    model: Annotated[str, typer.Argument(help="A saved model or Hub id, of any head.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    texts: Annotated[
        str,
        typer.Option(
            help="Where tokens are counted: .txt (a text a line), .jsonl, .csv, .parquet, a folder of splits, or builtin."
        ),
    ],
    held_out: Annotated[
        str | None, typer.Option(help="Texts to measure the change on; of a folder, validation and test.")
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="A token stays if it occurs this often.")] = 1,
    column: Annotated[str, typer.Option(help="The column of the text, where there are columns.")] = "text",
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in the folder.")] = False,
) -> None:
    """Keep only the tokens that some texts use: embeddings are over half of a small encoder.

    Special tokens and single characters (or bytes) stay, so that every text can still be encoded; a word whose token is gone
    falls into smaller pieces, which --held-out counts. On texts of kept tokens the model gives the same logits: this is
    proved from the written files, or nothing is left behind. The more texts, the safer: take all that you can get, not only
    the labelled ones, and fine-tune afterwards if many tokens change.

    \b
    finllm-prune trim outputs/quickstart/compact small --texts builtin --held-out builtin
    finllm-prune trim outputs/quickstart/compact small --texts filings.txt --min-count 2
    """
    from finllm_prune.trim import trim_saved

    trimmed, change = trim_saved(model, out, texts, held_out, min_count, column, overwrite)
    before, after = (trimmed.bytes[when] for when in ("before", "after"))
    console.print(f"{out}: {len(trimmed.old):,} of {trimmed.whole:,} tokens stay.", soft_wrap=True, highlight=False)
    console.print(
        f"Weights: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before:.2f} ×).", highlight=False
    )
    console.print(f"Proved on {len(trimmed.texts)} texts of kept tokens: the same logits.", highlight=False)
    if change is not None:
        console.print(f"Of {change.texts:,} texts, {change}.", soft_wrap=True, highlight=False)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The output of a run or of export, or one exported format.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name; made where there is none.")],
    revision: Annotated[str | None, typer.Option(help="The branch; main without it.")] = None,
    tag: Annotated[str | None, typer.Option(help="A name for this very commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the commit instead of making it.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="For everybody; without it a new repository is private.")
    ] = False,
    formats: Annotated[
        list[str] | None, typer.Option("--format", metavar="FORMAT", help="A format to push; can be given again.")
    ] = None,
    allow_failed_gates: Annotated[
        bool, typer.Option("--allow-failed-gates", help="Push what is no success; the card says so in its first line.")
    ] = False,
) -> None:
    """Push a finished model to the Hub in one commit, after proving it again from its files.

    \b
    finllm-prune push outputs/quickstart org/name
    finllm-prune push outputs/quickstart org/name --format compact --format onnx --tag v1

    The best format that plain transformers loads lies at the root, where from_pretrained("org/name") finds it; each other one
    in a folder of its name (subfolder="ragged"). The token is that of `hf auth login` or HF_TOKEN. What the Hub has already is
    not sent again. Local paths are left out of the recipe's copy; report and recorded steps stay here.

    Exit codes: 0 pushed, 2 bad input (a failed gate, an unknown file, a secret; nothing was sent), 4 a proof failed, 5 the
    Hub cannot be reached or refuses.
    """
    from finllm_prune.hub.push import Hub
    from finllm_prune.hub.push import push as push_folder

    hub = Hub(repo_id, private=not public, revision=revision, create_pr=create_pr, tag=tag)
    _print_pushed(push_folder(folder, hub, formats or [], allow_failed_gates=allow_failed_gates), repo_id)


@app.command()
def pull_and_compare(
    model: Annotated[str, typer.Argument(help="The pruned model: a saved one or a Hub id.")],
    baseline: Annotated[str, typer.Argument(help="The dense model to compare with: a saved one or a Hub id.")],
    data: Annotated[Path, typer.Option(help="Your own .csv (or .jsonl, .parquet), with or without labels.")],
    text: Annotated[str, typer.Option(help="The column of the text.")] = "text",
    label: Annotated[str, typer.Option(help="The column of the label, where there is one.")] = "label",
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    flips: Annotated[Path | None, typer.Option(help="Write the rows with another prediction here, as .csv.")] = None,
) -> None:
    """Hold a pruned model against the dense one on your own texts: agreement and flips; with labels, metrics too.

    \b
    finllm-prune pull-and-compare org/name org/name-dense --data mine.csv --flips flips.csv
    """
    from finllm_prune.comparison import compare_on

    for file in (json_file, flips):
        _refuse_no_folder(file)
    compared = compare_on(model, baseline, data, text, label, max_length)
    _print_rows(compared.rows, f"{model} against {baseline} on {data.name}")
    if json_file is not None:
        json_file.write_text(json.dumps(compared.figures, indent=2) + "\n")
    if flips is not None:
        compared.write_flips(flips)


def _version(show: bool) -> None:
    if show:
        console.print(f"finllm-prune {finllm_prune.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    logging.basicConfig(
        level=logging.WARNING if rank else logging.INFO,
        format="%(message)s" if ranks == 1 else f"[rank {rank}] %(message)s",
    )
    for talkative in ("httpx2", "accelerate", "bm25s"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    if ranks > 1:
        _one_of_several(rank)


def _one_of_several(rank: int) -> None:
    """The first process tells how it goes, with bars; the others only warn, and all warnings say whose they are."""
    if rank:
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging as theirs

    logging.captureWarnings(True)
    theirs.disable_default_handler()
    theirs.enable_propagation()
    if rank:
        theirs.disable_progress_bar()


def _refuse_no_folder(file: Path | None, option: str = "--json") -> None:
    if file is not None and not file.parent.is_dir():
        raise InputError(f"{option}: there is no folder {file.parent}; make it first, or name another file")


def _print_rows(rows: Sequence[tuple[str, ...]], title: str) -> None:
    table = Table("", *(["dense", "pruned"] if len(rows[0]) == 3 else ["measured"]), title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_written(written: "Sequence[Written]", source: str) -> None:
    table = Table("format", "files", "MB", "of the source", "loads with", "folder", title=f"{source} as")
    for each in written:
        table.add_row(
            each.format,
            str(each.files),
            f"{each.bytes / 1e6:.2f}",
            f"{each.ratio:.3f}",
            each.loads_with,
            str(each.folder),
        )
    console.print(table)


def _print_pushed(pushed: "Pushed", repo_id: str) -> None:
    for name, place in pushed.places.items():
        console.print(f"{name}: {repo_id}" + (f", subfolder {place}" if place else ""), soft_wrap=True, highlight=False)
    console.print(f"{'Pushed' if pushed.new else 'Nothing new'}: {pushed.url}", soft_wrap=True, highlight=False)


def main() -> None:
    """The console script: errors that a user can act on are one line, not a traceback."""
    try:
        app()
    except InputError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(BAD_INPUT) from None
    except ProofError as error:
        Console(stderr=True).print(f"[bold red]Proof failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(PROOF_FAILED) from None
    except HubError as error:
        Console(stderr=True).print(f"[bold red]Not pushed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(NOT_PUSHED) from None
